"""The engine's public names, imported on first use so that `import engine.scheduler` does not load torch."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Torch's OpenMP runtime reads it when it is loaded. By default a thread spins for 300,000 turns after each parallel
# operation, some 5 ms, on a core that another process or our kernels' threads (ops/cpu/team.cpp) could use. The count
# would overrule a user's OMP_WAIT_POLICY.
SPIN_COUNT = "20000"
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

if TYPE_CHECKING:
    from engine.completion import Choice, Completion, Piece, Timing
    from engine.llm import LLM, generate
    from engine.options import EngineOptions
    from engine.sampling_params import SamplingParams
    from engine.sequence import TokenLogprobs

_HOME = {
    "LLM": "llm",
    "Choice": "completion",
    "Completion": "completion",
    "EngineOptions": "options",
    "Piece": "completion",
    "SamplingParams": "sampling_params",
    "Timing": "completion",
    "TokenLogprobs": "sequence",
    "generate": "llm",
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
    if name in _HOME:
        return getattr(import_module(f"engine.{_HOME[name]}"), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
