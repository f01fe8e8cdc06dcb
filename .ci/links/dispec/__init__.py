"""DiSpec, an LLM inference engine: its public names, each imported on first use.

`import dispec` loads no torch; the first use of `dispec.LLM` does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dispec.engine.api.llm import LLM, generate
    from dispec.engine.api.outputs import Choice, Completion, Piece, Timing
    from dispec.engine.options import EngineOptions
    from dispec.engine.sampling_params import SamplingParams
    from dispec.engine.scheduling.sequence import TokenLogprobs

_MODULE_OF = {
    "LLM": "engine.api.llm",
    "Choice": "engine.api.outputs",
    "Completion": "engine.api.outputs",
    "EngineOptions": "engine.options",
    "Piece": "engine.api.outputs",
    "SamplingParams": "engine.sampling_params",
    "Timing": "engine.api.outputs",
    "TokenLogprobs": "engine.scheduling.sequence",
    "generate": "engine.api.llm",
}

__all__ = [
    "LLM",
    "Choice",
    "Completion",
    "EngineOptions",
    "Piece",
    "SamplingParams",
    "Timing",
    "TokenLogprobs",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"dispec.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'dispec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
