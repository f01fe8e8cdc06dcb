"""Log lines, warnings and errors of a command, each one line on standard error."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from dispec.engine.errors import LESS_MEMORY_HINT
from dispec.serving.client.errors import EngineDied

BAD_INPUT = 2
INTERRUPTED = 130  # as shells report a process that SIGINT ended
BROKEN_PIPE = 141  # the same for SIGPIPE

# Characters but tab and newline that C0, DEL and C1 give to terminals as orders.
_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10})
_LOGGERS = ("dispec", "engine")


def say(line: str) -> None:
    """Write a line to standard error, above any progress bar that is being drawn there."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None:
        tqdm.tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr)
    sys.stderr.flush()


def parameter_count(count: int) -> str:
    """Return a number of parameters as models are named by it, such as "135M" or "1.5B"."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M" if count >= 1e6 else str(count)


def printable(text: str) -> str:
    """Return what of a generated text to write to standard output.

    A terminal gets no control characters, by which a text could rename its window or fill the clipboard.
    """
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


def shows_progress(quiet: bool) -> bool:
    """Return whether to draw progress bars; without them, keep the hub's client from drawing its own."""
    shows = not quiet and sys.stderr.isatty()
    if not shows:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the client is first imported
    return shows


@contextmanager
def reporting(*, quiet: bool, debug: bool) -> Iterator[None]:
    """Run a command: write its log lines, warnings and errors as one line each, and turn errors into an exit code.

    quiet: leave informative log lines out. debug: write the traceback of an error. Raises typer.Exit.
    """
    with warnings.catch_warnings(), _log_lines(logging.WARNING if quiet else logging.INFO):
        warnings.showwarning = _show_warning
        try:
            yield
            sys.stdout.flush()
        except typer.Exit:
            raise
        except KeyboardInterrupt as error:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            # The reader has closed the pipe. The interpreter flushes once more at exit, into /dev/null.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from error
        except Exception as error:
            if debug:
                traceback.print_exc()
            sentence, code = explain(error)
            say(f"error: {sentence}")
            raise typer.Exit(code) from error


def explain(error: BaseException) -> tuple[str, int]:
    """Return an error as one sentence, and its exit code: 2 for invalid input, else 1."""
    text = " ".join(str(error).split())
    if isinstance(error, EngineDied):
        if error.is_bad_input:
            return " ".join(error.message.split()), BAD_INPUT
        return f"the engine could not go on: {text}", 1
    if isinstance(error, ValueError):
        return text or "the input is not valid", BAD_INPUT
    # Torch raises a class of its own for CUDA and a RuntimeError for the CPU; the names avoid its import.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text:
        detail = f" ({text})" if text else ""
        return f"not enough memory{detail}: {LESS_MEMORY_HINT}", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1
    if isinstance(error, ImportError):
        return f"a package is missing or broken ({text}): install DiSpec again, or run `dispec env-check`", 1
    first = text if len(text) <= 300 else f"{text[:300]}…"
    return f"unexpected {type(error).__name__}: {first} (--debug shows where it came from)", 1


@contextmanager
def _log_lines(level: int) -> Iterator[None]:
    handler = _Lines()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (old_level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = propagate


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            say(prefix + record.getMessage())
        except Exception:  # a log line must never end the program
            self.handleError(record)


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    say(f"warning: {' '.join(str(message).split())}")
