"""DiSpec, an LLM inference engine: its public names, each imported on first use.

`import dispec` loads no torch; the first use of `dispec.LLM` does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import dispec.engine  # noqa: F401  # sets the spin count of OpenMP's threads before torch is loaded
from dispec.engine.names_of_vllm import ADVICE

if TYPE_CHECKING:
    from dispec.engine.api.async_llm import AsyncLLM as AsyncLLM
    from dispec.engine.api.llm import LLM as LLM
    from dispec.engine.api.llm import generate as generate
    from dispec.engine.api.outputs import CompletionOutput as CompletionOutput
    from dispec.engine.api.outputs import Logprob as Logprob
    from dispec.engine.api.outputs import RequestMetrics as RequestMetrics
    from dispec.engine.api.outputs import RequestOutput as RequestOutput
    from dispec.engine.options import EngineOptions as EngineOptions
    from dispec.engine.sampling_params import RequestOutputKind as RequestOutputKind
    from dispec.engine.sampling_params import SamplingParams as SamplingParams

_MODULE_OF = {
    "AsyncLLM": "dispec.engine.api.async_llm",
    "LLM": "dispec.engine.api.llm",
    "generate": "dispec.engine.api.llm",
    "CompletionOutput": "dispec.engine.api.outputs",
    "Logprob": "dispec.engine.api.outputs",
    "RequestMetrics": "dispec.engine.api.outputs",
    "RequestOutput": "dispec.engine.api.outputs",
    "EngineOptions": "dispec.engine.options",
    "RequestOutputKind": "dispec.engine.sampling_params",
    "SamplingParams": "dispec.engine.sampling_params",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    if (advice := ADVICE["dispec"].get(name)) is not None:  # Python replaces an AttributeError of `from dispec import`
        raise ImportError(f"dispec has no {name}: {advice}")
    raise AttributeError(f"module 'dispec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
