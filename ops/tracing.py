"""What the compiler shall know about plain functions that it meets while it traces."""

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant(function: _Function) -> _Function:
    """Call it while tracing and take its result for a constant.

    What `torch.compiler.assume_constant_result` does, which imports the compiler to do it: a second of every start,
    whether anything is compiled or not.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
