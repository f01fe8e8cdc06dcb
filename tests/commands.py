"""Running `dispec` in tests, in this process where that is enough, else in one of its own."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dispec.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "dispec"]
# Threads that wait for one another collapse where other processes share their cores, as on a busy build machine.
THREADS = "1"


class Result(NamedTuple):
    code: int
    out: str
    err: str


def dispec(*args: str) -> Result:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_:
        main(list(args))
    assert isinstance(exit_.value.code, int)
    return Result(exit_.value.code, out.getvalue(), err.getvalue())


def eager(model: str, *args: str) -> list[str]:
    return ["--model", model, "--enforce-eager", "--kv-cache-memory", "4MiB", *args]


def one_sentence(result: Result) -> str:
    """What an error said, after checking that it is all that was said about it."""
    assert "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert result.err.splitlines()[-1] == errors[0]
    return errors[0]


def _spawn(args: list[str], **options: Any) -> subprocess.Popen[bytes]:
    # A shell may have started us with SIGINT ignored, which a child would inherit; a handler it does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ | {"OMP_NUM_THREADS": THREADS}
    try:
        return subprocess.Popen([*COMMAND, *args], cwd=ROOT, env=environment, start_new_session=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def running(args: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = _spawn(args, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def read_until(file: Any, text: str) -> str:
    """Read, as it comes, to the end of `text`."""
    seen = b""
    while not seen.endswith(text.encode()):
        byte = os.read(file.fileno(), 1)
        assert byte, f"{text!r} never came: {seen.decode()}"
        seen += byte
    return seen.decode()
