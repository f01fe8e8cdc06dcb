"""Dataclass fields that are declared once: type, help, limits and default.

Checks, documentation, command-line flags, environment variables and TOML keys all follow from the declaration.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, MISSING, FrozenInstanceError, dataclass, fields
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from dispec.engine.errors import InvalidField
from dispec.engine.unknown_names import field_names, refuse_unknown

_T = TypeVar("_T")

_KINDS: dict[Any, tuple[type, str]] = {int: (Integral, "an integer"), float: (Real, "a number"), str: (str, "a text")}


@dataclass(frozen=True)
class Option:
    """The help, limits and flags of a field, as metadata of `Annotated`.

    help: one or two sentences. ge, le, gt: inclusive limits, exclusive lower limit; `unit` follows them in errors.
    default: the meaning of a default of None. flags: instead of the field's name. aliases: earlier names of the field.
    group: heading in the help of the command line. parse: makes the value from the command line's
    text, or list of texts for a tuple. Raises ValueError.
    """

    help: str
    _: KW_ONLY
    ge: float | None = None
    le: float | None = None
    gt: float | None = None
    unit: str = ""
    default: str = ""
    flags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    group: str = ""
    parse: Callable[[Any], Any] | None = None


class OptionField(NamedTuple):
    """A field as declared. types: the members of its union without None. choices: the values of its Literal."""

    name: str
    option: Option
    types: tuple[Any, ...]
    is_optional: bool
    choices: tuple[Any, ...]
    default: Any

    @property
    def is_list(self) -> bool:
        return get_origin(self.types[0]) in (tuple, Sequence)

    @property
    def scalar_type(self) -> type:
        """The type of a single value as a flag; a text where the class parses it."""
        if self.choices:
            return type(self.choices[0])
        return self.types[0] if self.types in ((int,), (float,), (bool,)) else str

    def default_text(self) -> str:
        """Return the default in words; empty if there is none to tell."""
        if self.option.default or self.default is None or self.default == ():
            return self.option.default
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return ", ".join(self.default) if isinstance(self.default, tuple) else str(self.default).removesuffix(".0")


@functools.cache
def option_fields(cls: type) -> dict[str, OptionField]:
    """Return the fields of a dataclass that are declared with an `Option`, by name."""
    found = {}
    for field in fields(cls):
        if get_origin(field.type) is Annotated:
            annotation, option = get_args(field.type)
            members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
            types = tuple(one for one in members if one is not type(None))
            choices = get_args(types[0]) if get_origin(types[0]) is Literal else ()
            default = None if field.default is MISSING else field.default
            is_optional = len(types) < len(members)
            found[field.name] = OptionField(field.name, option, types, is_optional, choices, default)
    return found


def invalid_field(name: str, problem: str) -> InvalidField:
    """Return the error of a field; the sentence begins with its name."""
    return InvalidField(name, f"{name} {problem}")


def check_fields(instance: object) -> None:
    """Raise InvalidField for the first field with a value that breaks its declaration.

    Numbers, texts and choices are checked; values of other types are for the class to check.
    """
    cls: Any = type(instance)
    for name, field in option_fields(cls).items():
        value = getattr(instance, name)
        if value is None and field.is_optional:
            continue
        if field.choices:
            if not any(value == choice and type(value) is type(choice) for choice in field.choices):
                choices = ", ".join(map(str, field.choices))
                raise invalid_field(name, f"is {value!r:.50}, must be one of {choices}")
        elif len(field.types) == 1 and field.types[0] in _KINDS:
            kind, kind_name = _KINDS[field.types[0]]
            if not isinstance(value, kind) or isinstance(value, bool):
                shown = type(value).__name__ if kind is str else f"{value!r:.50}"
                raise invalid_field(name, f"is {shown}, must be {kind_name}")
            if kind is not str:
                _check_limits(name, value, field.option)
        elif field.types == (bool,) and value not in (True, False):
            raise invalid_field(name, f"is {value!r:.50}, must be true or false")


def _check_limits(name: str, value: Any, option: Option) -> None:
    if (
        (option.ge is None or value >= option.ge)  # comparisons with NaN are false
        and (option.le is None or value <= option.le)
        and (option.gt is None or value > option.gt)
    ):
        return
    if option.gt is not None:
        limits = f"above {option.gt} and at most {option.le}"
    else:
        limits = f"at least {option.ge}" if option.le is None else f"between {option.ge} and {option.le}"
    raise invalid_field(name, f"is {value}, must be {limits}{option.unit and f' {option.unit}'}")


def with_declared_fields(cls: type[_T]) -> type[_T]:
    """Have a frozen dataclass document its declared fields, and name the way where it cannot be set or called so.

    An unknown name raises ValueError, not TypeError, and an assignment FrozenInstanceError.

    The class calls `check_fields` in `__post_init__`.
    """
    make, names = cls.__init__, field_names(cls)

    @functools.wraps(make)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        refuse_unknown(cls.__name__, given, names)
        make(self, *args, **given)

    def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807
        raise FrozenInstanceError(f"{cls.__name__} cannot be changed: use dataclasses.replace(…, {name}=…)")

    cls.__init__ = checked  # type: ignore[method-assign]
    cls.__setattr__ = __setattr__  # type: ignore[method-assign]
    signature = inspect.signature(make)
    parameters = [one.replace(annotation=_without_metadata(one.annotation)) for one in signature.parameters.values()]
    cls.__signature__ = signature.replace(parameters=parameters[1:])  # type: ignore[attr-defined]
    cls.__no_type_check__ = True  # type: ignore[attr-defined]  # jaxtyping's import hook leaves the checks to us
    cls.__doc__ = f"{cls.__doc__}\n\n{documentation(cls)}\n"
    return cls


def _without_metadata(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def documentation(cls: type) -> str:
    """Return a line for each declared field: its name, help and default."""
    lines = []
    for name, field in option_fields(cls).items():
        default = field.default_text()
        lines.append(f"{name}: {field.option.help}{default and f' Default: {default}.'}")
    return "\n".join(lines)
