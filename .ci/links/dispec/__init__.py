"""DiSpec, an LLM inference engine: its public names, each imported on first use.

`import dispec` loads no torch; the first use of `dispec.LLM` does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import dispec.engine  # noqa: F401  # sets the spin count of OpenMP's threads before torch is loaded

if TYPE_CHECKING:
    from dispec.engine.api.llm import LLM as LLM
    from dispec.engine.api.llm import generate as generate
    from dispec.engine.api.outputs import Choice as Choice
    from dispec.engine.api.outputs import Completion as Completion
    from dispec.engine.api.outputs import Piece as Piece
    from dispec.engine.api.outputs import Timing as Timing
    from dispec.engine.options import EngineOptions as EngineOptions
    from dispec.engine.sampling_params import SamplingParams as SamplingParams
    from dispec.engine.scheduling.token_output import TokenLogprobs as TokenLogprobs

_MODULE_OF = {
    "LLM": "dispec.engine.api.llm",
    "generate": "dispec.engine.api.llm",
    "Choice": "dispec.engine.api.outputs",
    "Completion": "dispec.engine.api.outputs",
    "Piece": "dispec.engine.api.outputs",
    "Timing": "dispec.engine.api.outputs",
    "EngineOptions": "dispec.engine.options",
    "SamplingParams": "dispec.engine.sampling_params",
    "TokenLogprobs": "dispec.engine.scheduling.token_output",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'dispec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
