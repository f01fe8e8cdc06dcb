"""Options of commands, from fields that are declared elsewhere: flags, DISPEC_ variables and keys of a TOML file."""

import functools
import inspect
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import typer

from dispec.engine.loading.model_source import DEFAULT_MODEL, SPECULATIVE_MODELS
from dispec.engine.option_fields import OptionField, option_fields
from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import SamplingParams
from dispec.serving.cli.completion import complete_choices, complete_model
from dispec.serving.settings import ServerSettings

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="On standard error, only warnings and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]

_IN_PYTHON_ALONE = ("seed", "show_progress")
_MODELS = {"model": (DEFAULT_MODEL,), "speculative_model": SPECULATIVE_MODELS}  # names that are no path or hub id


class OptionGroup(NamedTuple):
    """Fields of a class that become options.

    defaults: those of the command, where they differ from the class's. found_defaults: in words, those that the command
    finds out itself.
    """

    cls: type
    title: str
    names: tuple[str, ...]
    defaults: Mapping[str, Any] = MappingProxyType({})
    found_defaults: Mapping[str, str] = MappingProxyType({})

    def fields(self) -> list[OptionField]:
        return [option_fields(self.cls)[name] for name in self.names]

    def take(self, given: dict[str, Any]) -> dict[str, Any]:
        """Move this group's values out of `given`. A value that was not given is left out, or is that of `defaults`."""
        values = {name: given.pop(name) for name in self.names}
        return {**self.defaults, **{name: value for name, value in values.items() if value not in (None, [])}}


def engine_group(**defaults: Any) -> OptionGroup:
    """Return the options of `LLM` and `dispec serve`; the model is always among the values."""
    names = tuple(name for name in option_fields(EngineOptions) if name not in _IN_PYTHON_ALONE)
    return OptionGroup(EngineOptions, "Engine", names, {"model": EngineOptions.model, **defaults})


SAMPLING = OptionGroup(
    SamplingParams,
    "Sampling",
    ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed", "ignore_eos"),
    {"max_tokens": 512, "temperature": 0.0},
)
SERVER = OptionGroup(ServerSettings, "Server", tuple(option_fields(ServerSettings)))


def parsed(group: OptionGroup, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of the group's class from what `take` returned. Raises ValueError."""
    values = {}
    for name, value in given.items():
        parse = option_fields(group.cls)[name].option.parse
        values[name] = parse(value) if parse is not None else tuple(value) if isinstance(value, list) else value
    return values


def with_options(**groups: OptionGroup) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add groups of options to a command, which receives the values of each as a dictionary of the group's name."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [one for one in inspect.signature(command).parameters.values() if one.name not in groups]
        added = [_parameter(group, field) for group in groups.values() for field in group.fields()]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own, *added)]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {name: group.take(given) for name, group in groups.items()}
            command(**given, **values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _parameter(group: OptionGroup, field: OptionField) -> inspect.Parameter:
    """Return a field as a parameter that Typer reads; its default is None, by which `take` knows what was given."""
    names = (field.name, *field.option.aliases)
    kind: Any = list[str] if field.is_list else field.scalar_type
    help_text = field.option.help + (" Can be given several times." if field.is_list else "")
    stated = {**group.defaults, **group.found_defaults}
    if default := str(stated.get(field.name, field.default_text())).removesuffix(".0"):
        help_text += f" Default: {default}."
    flags = field.option.flags  # without any, Typer derives them from the name: two from that of a boolean
    if field.option.aliases:
        flags = tuple(f"--{name.replace('_', '-')}" for name in names)
    option = typer.Option(
        *flags,
        help=help_text,
        show_default=False,
        # Those of the field and of its flags, which differ for --prefix-caching.
        envvar=list(dict.fromkeys(f"DISPEC_{name.upper()}" for name in (*names, *map(_plain, flags)))),
        rich_help_panel=field.option.group or group.title,
        autocompletion=_completion(field),
    )
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _completion(field: OptionField) -> Callable[[str], list[str]] | None:
    if field.name in _MODELS:
        return complete_model(_MODELS[field.name])
    return complete_choices(field.choices) if field.choices else None


def _plain(flag: str) -> str:
    return flag.partition("/")[0].lstrip("-").replace("-", "_")


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a TOML file the defaults of the command's options. Raises typer.BadParameter."""
    if path is None:
        return None
    try:
        stated = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} is not TOML: {error}") from error
    options = [one for one in context.command.params if one.param_type_name == "option"]
    known = {_plain(name): option for option in options for name in (option.name, *option.opts)}
    defaults: dict[str, Any] = {}
    for key, value in stated.items():
        option = known.get(key.replace("-", "_"))
        if option is None or option.name in ("config", "help"):
            raise typer.BadParameter(f"{path} has {key!r}, which is no option of this command (see --help)")
        takes_list, is_flag = bool(getattr(option, "multiple", False)), bool(getattr(option, "is_flag", False))
        values = value if takes_list and isinstance(value, list) else [value]
        for item in values:
            if isinstance(item, bool) != is_flag or not isinstance(item, bool | int | float | str):
                kind = "true or false" if is_flag else "a text or a number"
                raise typer.BadParameter(f"{path}: {key} is {item!r}, must be {kind}")
        defaults[option.name] = values if takes_list else value
    context.default_map = defaults
    return path
