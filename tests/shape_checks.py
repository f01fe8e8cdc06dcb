"""The checker that pytest's jaxtyping hook puts around every function of layers, ops and engine."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and results against their annotations; an int is a float, as PEP 484 has it."""
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
