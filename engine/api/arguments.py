"""Checks of the arguments of `LLM`: unknown names are answered with a sentence, without `**unknown` in signatures."""

import functools
import inspect
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Series
from typing import Any, Concatenate, ParamSpec, TypeVar

from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.unknown_names import field_names, refuse_unknown

Params = SamplingParams | Series[SamplingParams] | None

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Where a name belongs that was passed to another function.
IN_PARAMS = {"sampling_params=SamplingParams({}=…)": field_names(SamplingParams)}
IN_LLM = {"LLM({}=…)": field_names(EngineOptions)}


def refusing_unknown_names(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have a method raise ValueError, not TypeError, for a name that it does not have, with the name that was meant."""
    names = tuple(name for name in inspect.signature(method).parameters if name != "self")

    @functools.wraps(method)
    def checked(*args: _P.args, **given: _P.kwargs) -> _R:
        refuse_unknown(method.__name__, given, names, IN_PARAMS | IN_LLM)
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


def one_for_each(given: Params, count: int) -> list[SamplingParams]:
    """Return the parameters of each of `count` prompts. Raises ValueError for anything but SamplingParams."""
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    name = type(given).__name__
    if isinstance(given, Mapping):
        refuse_unknown("SamplingParams", map(str, given), field_names(SamplingParams))
        fields = ", ".join(f"{field}={value!r:.50}" for field, value in given.items())
        raise ValueError(f"sampling_params is {name}, must be SamplingParams: write SamplingParams({fields})")
    if not isinstance(given, Series) or isinstance(given, str | bytes):
        raise ValueError(f"sampling_params is {name}, must be SamplingParams or a list of them")
    for index, one in enumerate(given):
        if not isinstance(one, SamplingParams):
            raise ValueError(f"sampling_params[{index}] is {type(one).__name__}, must be SamplingParams")
    if len(given) != count:
        raise ValueError(f"sampling_params holds {len(given)} SamplingParams for {count} prompts")
    return list(given)
