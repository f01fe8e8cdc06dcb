"""Compiling while the engine answers, in small pieces: for a CPU after a process beside it has filled the cache."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import msgspec
import torch

from engine.compile_cache import Order, marker
from engine.compile_pieces import Compiled
from engine.compiled_model import first_cause, warn_eager

log = logging.getLogger("dispec")

_ROOT = Path(__file__).resolve().parent.parent
_COMMAND = (sys.executable, "-P", "-m", "engine.compile_ahead")
# While requests run, at most a twentieth of the time goes into this; until it is known, a piece counts as this long.
_BUSY_SHARE = 0.05
_LONGEST_PIECE = 1.0


class CompileBehind:
    """Has an order compiled by another process, and then takes the pieces from the cache, one at a time.

    On CUDA there is no other process: what is not in the cache yet is compiled while the engine has nothing to do.
    No thread and no clock of its own: the engine calls `advance` between two steps, and when it has nothing to do.
    """

    def __init__(self, order: Order, pieces: Generator[None, None, Compiled]) -> None:
        self._pieces = pieces
        self._marker = marker(order)
        is_cached = self._marker.exists()
        self._waits_for_rest = not is_cached and order.device != "cpu"
        self._child: subprocess.Popen[bytes] | None = None
        self._said = b""
        self._began = time.perf_counter()
        self._due = self._began + _LONGEST_PIECE / _BUSY_SHARE
        self.seconds = 0.0
        self.has_ended = False
        if not is_cached and order.device == "cpu":
            try:
                self._child = _start(order)
            except OSError as error:
                self._fail(str(error))

    @property
    def is_waiting(self) -> bool:
        """Whether the other process is at work, so that there is nothing to do here."""
        return self._child is not None

    def fileno(self) -> int | None:
        """Becomes readable when the other process has ended; None if there is none."""
        return self._child.stdout.fileno() if self._child is not None and self._child.stdout is not None else None

    def advance(self, *, is_idle: bool) -> Compiled | None:
        """Take a piece if it is time to; what was compiled, once that is all. Warns once if it failed."""
        if self.has_ended or (self._child is not None and not self._child_is_done()):
            return None
        started = time.perf_counter()
        if self.has_ended or not (is_idle or (started >= self._due and not self._waits_for_rest)):
            return None
        try:
            with torch.inference_mode():
                next(self._pieces)
        except StopIteration as end:
            self.has_ended = True
            self._marker.touch()
            self.seconds = time.perf_counter() - self._began
            compiled: Compiled = end.value
            return compiled
        except Exception as error:  # a compiler can fail in any way; the engine works without one
            self._fail(first_cause(error))
            return None
        now = time.perf_counter()
        self._due = now + (now - started) / _BUSY_SHARE
        return None

    def close(self) -> None:
        """Give up what is not done yet; the other process ends by itself when its input does."""
        self.has_ended = True
        if self._child is not None and self._child.stdin is not None and self._child.stdout is not None:
            self._child.stdin.close()
            self._child.stdout.close()
            self._child.wait()
            self._child = None

    def _child_is_done(self) -> bool:
        assert self._child is not None
        assert self._child.stdout is not None
        try:
            while said := os.read(self._child.stdout.fileno(), 4096):
                self._said += said
        except BlockingIOError:
            return False
        child = self._child
        code = child.wait()
        self.close()
        self.has_ended = False
        if code:
            lines = self._said.decode(errors="replace").strip().splitlines()
            self._fail(lines[-1] if lines else f"the process that compiles ended with code {code}")
        return True

    def _fail(self, reason: str) -> None:
        self.has_ended = True
        warn_eager(reason)


def _start(order: Order) -> "subprocess.Popen[bytes]":
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    child = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what matters it says on standard output
        env=environment,
        start_new_session=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    child.stdin.write(msgspec.json.encode(order) + b"\n")
    child.stdin.flush()
    return child
