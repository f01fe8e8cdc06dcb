"""The checker that pytest's jaxtyping hook puts around every function of layers, ops and engine.

A function is checked at its first `MAX_CHECKS` calls in each test. With every call checked, tests of engines take up to
twice as long (tests/test_grammar_steps.py: 12 s instead of 8).
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

MAX_CHECKS = 100

_counts: dict[Callable[..., Any], int] = {}  # checks of the current test, by the functions below
_unchecked: set[Any] = set()


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and results against their annotations; an int is a float, as PEP 484 has it.

    function: jaxtyping's stand-in, which has the name of the function that is checked.
    """
    checked = beartype(conf=BeartypeConf(is_pep484_tower=True))(function)

    @functools.wraps(checked)
    def counted(*args: Any, **named: Any) -> Any:
        _counts[counted] = count = _counts.get(counted, 0) + 1
        if count == MAX_CHECKS and (found := _find(function)) is not None:
            found.__no_type_check__ = True  # jaxtyping looks at it in each call
            _unchecked.add(found)
        return checked(*args, **named)

    return counted


def check_again() -> None:
    """Check all functions as at the beginning."""
    _counts.clear()
    for function in _unchecked:
        del function.__no_type_check__
    _unchecked.clear()


def _find(function: Callable[..., Any]) -> Any:
    """Return the function of a module or class that has this name, with jaxtyping's wrapper; None for inner ones."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(name)
    found = getattr(found, "fget", None) or getattr(found, "func", None) or getattr(found, "__func__", None) or found
    return found if callable(found) and hasattr(found, "__wrapped__") else None
