"""A name that is none of a call's or a class's own is refused, with the name that was probably meant."""

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, TypeVar

_T = TypeVar("_T")

_LEAST_LIKENESS = 0.55  # of two names, as difflib rates it: "sampling_params" is that much like "params"
_NOWHERE: Mapping[str, Collection[str]] = MappingProxyType({})


def refuse_unknown(
    owner: str,
    given: Iterable[str],
    known: Collection[str],
    elsewhere: Mapping[str, Collection[str]] = _NOWHERE,
) -> None:
    """Raise ValueError for the first of the names that is not known to the owner.

    elsewhere: names that belong to something else, by how they are written there: {} stands for the name.
    """
    forms = {name: form for form, names in elsewhere.items() for name in names} | dict.fromkeys(known, "{}")
    for name in given:
        if name in known:
            continue
        likely = [name] if name in forms else get_close_matches(name, forms, 1, _LEAST_LIKENESS)
        if likely:
            raise ValueError(f"{owner} has no {name}: did you mean {forms[likely[0]].format(likely[0])}?")
        raise ValueError(f"{owner} has no {name}: it has {', '.join(known)}")


def field_names(cls: type) -> tuple[str, ...]:
    """What a dataclass can be made with."""
    return tuple(field.name for field in fields(cls) if field.init)


def with_checked_names(cls: type[_T]) -> type[_T]:
    """Have a dataclass raise ValueError for a field that it does not have, and not TypeError."""
    make, names = cls.__init__, field_names(cls)

    @functools.wraps(make)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        refuse_unknown(cls.__name__, given, names)
        make(self, *args, **given)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls
