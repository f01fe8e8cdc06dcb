"""Refuse unknown argument names, and suggest the name that was probably meant."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from types import MappingProxyType

from dispec.engine.names_of_vllm import ADVICE

_LEAST_LIKENESS = 0.55  # of two names, as difflib rates it: "sampling_params" is that much like "params"
_NOWHERE: Mapping[str, Collection[str]] = MappingProxyType({})


def refuse_unknown(
    owner: str,
    given: Iterable[str],
    known: Collection[str],
    elsewhere: Mapping[str, Collection[str]] = _NOWHERE,
) -> None:
    """Raise ValueError for the first given name that is not among the names known to the owner.

    elsewhere: names that belong to another call, by the form in which they are written there; {} stands for the name.
    """
    forms = {name: form for form, names in elsewhere.items() for name in names} | dict.fromkeys(known, "{}")
    for name in given:
        if name in known:
            continue
        if (advice := ADVICE.get(owner, {}).get(name)) is not None:
            raise ValueError(f"{owner} has no {name}: {advice}")
        likely = [name] if name in forms else get_close_matches(name, forms, 1, _LEAST_LIKENESS)
        if likely:
            raise ValueError(f"{owner} has no {name}: did you mean {forms[likely[0]].format(likely[0])}?")
        raise ValueError(f"{owner} has no {name}: it has {', '.join(known)}")


def field_names(cls: type) -> tuple[str, ...]:
    """Return the names of the arguments of a dataclass."""
    return tuple(field.name for field in fields(cls) if field.init)
