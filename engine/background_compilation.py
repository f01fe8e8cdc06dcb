"""Compiling while an engine on CUDA answers from recorded graphs, in pieces of a graph each."""

import time
from collections.abc import Generator

import torch

from engine.cache import known_failure, remember_failure
from engine.compile_cache import CompileKey, stamp, write_stamp
from engine.compile_pieces import Compiled
from engine.compiled_model import first_cause, warn_eager

# While prompts run of which no single token is awaited, at most a twentieth of the time goes into this; until it is
# known, a piece counts as this long.
_BUSY_SHARE = 0.05
_LONGEST_PIECE = 1.0


class BackgroundCompilation:
    """Compiles piece by piece, when the engine asks it to: between two steps, or when there is nothing else to do.

    What is not in the cache yet takes longer, and is compiled only while the engine is idle. A key that failed within
    the last day, and has not been compiled since, is not tried again.
    """

    def __init__(self, key: CompileKey, pieces: Generator[None, None, Compiled]) -> None:
        self._pieces = pieces
        self._key = key
        self._is_cached = stamp(key).exists()
        self._began = time.perf_counter()
        self._due = self._began + _LONGEST_PIECE / _BUSY_SHARE
        self.seconds = 0.0
        self.has_ended = False
        if not self._is_cached and (reason := known_failure(stamp(key))) is not None:
            self._fail(f"{reason}, found at an earlier start")

    def advance(self, *, is_idle: bool, may_pause: bool = False) -> Compiled | None:
        """Compile a piece if it is time to. Return what was compiled, once that is all. Warns once if it failed.

        may_pause: whether an engine that is not idle may stop for a piece.
        """
        started = time.perf_counter()
        if self.has_ended or not (is_idle or (may_pause and self._is_cached and started >= self._due)):
            return None
        try:
            with torch.inference_mode():
                next(self._pieces)
        except StopIteration as end:
            self.has_ended = True
            write_stamp(self._key)
            self.seconds = time.perf_counter() - self._began
            compiled: Compiled = end.value
            return compiled
        except Exception as error:  # a compiler can fail in any way; the engine works without one
            reason = first_cause(error)
            remember_failure(stamp(self._key), reason)
            self._fail(reason)
            return None
        now = time.perf_counter()
        self._due = now + (now - started) / _BUSY_SHARE
        return None

    def _fail(self, reason: str) -> None:
        self.has_ended = True
        warn_eager(reason)
