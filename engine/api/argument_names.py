"""Answer unknown keyword arguments with a sentence, without `**unknown` in signatures."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.unknown_names import field_names, refuse_unknown

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Where a name belongs that was passed to another function.
IN_PARAMS = {"sampling_params=SamplingParams({}=…)": field_names(SamplingParams)}
IN_LLM = {"LLM({}=…)": field_names(EngineOptions)}
RENAMED = {"params": "did you mean sampling_params?"}


def refusing_unknown_names(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have a method raise ValueError, not TypeError, for a name that it does not have, with the name that was meant."""
    names = tuple(name for name in inspect.signature(method).parameters if name != "self")

    @functools.wraps(method)
    def checked(*args: _P.args, **given: _P.kwargs) -> _R:
        refuse_unknown(method.__name__, given, names, IN_PARAMS | IN_LLM, RENAMED)
        return method(*args, **given)

    return checked


def with_parameters_of(
    options: Callable[_P, EngineOptions],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, _P], None]]:
    """Give a method the parameters of a class, with their types and documentation, for editors and type checkers."""

    def decorate(method: Callable[..., None]) -> Callable[Concatenate[Any, _P], None]:
        own = next(iter(inspect.signature(method).parameters.values()))
        taken = inspect.signature(options)
        method.__signature__ = taken.replace(parameters=[own, *taken.parameters.values()])  # type: ignore[attr-defined]
        method.__doc__ = options.__doc__
        return method

    return decorate
