"""What a terminal shows beside the answers."""

import sys

from dispec.serving.cli.console import say

_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"  # SGR 2 and 0 of ECMA-48


def is_terminal() -> bool:
    """Return whether questions come from a terminal and answers go to one."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def dimmed(text: str) -> str:
    """Return a text that terminals show dimmed."""
    return f"{_DIM}{text}{_NORMAL}"


def say_dimmed(line: str) -> None:
    """Write a line to standard error, dimmed if that is a terminal."""
    say(dimmed(line) if sys.stderr.isatty() else line)
