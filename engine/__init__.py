"""The engine's public names, imported on first use so that `import engine.scheduler` does not load torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.llm import LLM, Completion, Piece, Timing, generate
    from engine.options import EngineOptions
    from engine.sequence import SamplingParams

_HOME = {
    "LLM": "llm",
    "Completion": "llm",
    "EngineOptions": "options",
    "Piece": "llm",
    "SamplingParams": "sequence",
    "Timing": "llm",
    "generate": "llm",
}

__all__ = ["LLM", "Completion", "EngineOptions", "Piece", "SamplingParams", "Timing", "generate"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"engine.{_HOME[name]}"), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
