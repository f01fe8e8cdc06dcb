"""Sampling parameters of a conversation: their defaults, and `/set`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from dispec.engine.loading.generation_config import generation_defaults
from dispec.engine.option_fields import Option, OptionField, option_fields
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.unknown_names import refuse_unknown

if TYPE_CHECKING:
    from dispec.engine.loading.checkpoint import Checkpoint

SAMPLING_FALLBACK = {"temperature": 0.7, "top_p": 0.95}
_NOT_IN_A_CHAT = ("n", "logprobs", "prompt_logprobs")
_UNLIMITED = 2**31 - 1  # a limit of this size is none to a reader


def sampling_defaults(checkpoint: "Checkpoint | None") -> Mapping[str, Any]:
    """Return values for parameters that the command line leaves open: the model's own, else usual ones."""
    return generation_defaults(None if checkpoint is None else checkpoint.directory) or SAMPLING_FALLBACK


def settable() -> dict[str, OptionField]:
    """Return the sampling parameters that apply to one shown answer, by name."""
    return {name: field for name, field in option_fields(SamplingParams).items() if name not in _NOT_IN_A_CHAT}


def with_setting(params: SamplingParams, name: str, text: str, defaults: SamplingParams) -> SamplingParams:
    """Return the parameters with one of them changed to the value that a text spells.

    Numbers, true and false are written as they are, other values as JSON; a list may be its single item, and "default"
    is the value in `defaults`. Raises ValueError for an unknown name and, as `SamplingParams` does, for a wrong value.
    """
    field = _field(name)
    return replace(params, **{name: getattr(defaults, name) if text == "default" else _value(field, text)})


def setting_line(params: SamplingParams, name: str) -> str:
    """Return a parameter's value, limits and meaning."""
    field = _field(name)
    limits = _limits(field.option)
    return f"{name} is {_shown(field, getattr(params, name))}{limits and f' ({limits})'}: {field.option.help}"


def setting_lines(params: SamplingParams) -> Iterator[str]:
    """Yield a line for each parameter with its value and limits."""
    width = max(map(len, settable()))
    for name, field in settable().items():
        yield f"  {name:<{width}}  {_shown(field, getattr(params, name)):<12}  {_limits(field.option)}".rstrip()


def changed_settings(params: SamplingParams) -> str:
    """Return the parameters that change how tokens are sampled, such as "temperature 0.2, top_p 0.9"."""
    parts = []
    for name, field in settable().items():
        value = getattr(params, name)
        if name == "temperature" or (name != "max_tokens" and value not in (field.default, (), {})):
            parts.append(f"{name} {_shown(field, value)}")
    return ", ".join(parts)


def _field(name: str) -> OptionField:
    if name in _NOT_IN_A_CHAT:
        raise ValueError(f"{name} cannot be set here: a chat shows one answer, without log-probabilities")
    refuse_unknown("/set", [name], settable())
    return settable()[name]


def _value(field: OptionField, text: str) -> Any:
    """Return the value that a text spells, or the text, for `SamplingParams` to refuse."""
    if field.is_optional and text.lower() == "none":
        return None
    if field.types[0] in (int, float, bool):
        try:
            return msgspec.convert(text, field.types[0], strict=False)
        except msgspec.ValidationError:
            return text
    try:
        value = json.loads(text)
    except ValueError:
        return [text] if field.is_list else text
    if field.name == "logit_bias" and isinstance(value, dict):
        return {int(key) if key.isdecimal() else key: bias for key, bias in value.items()}
    if field.is_list and not isinstance(value, list):
        return [text if get_args(field.types[0])[0] is str else value]
    return value


def _shown(field: OptionField, value: Any) -> str:
    if value is None or (value == () and not field.option.default):
        return field.option.default or "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return json.dumps({str(key): one for key, one in value.items()}, ensure_ascii=False) if value else "none"
    if isinstance(value, tuple):
        return json.dumps(value, ensure_ascii=False)
    label = getattr(value, "kind", None)  # of structured outputs
    return str(value if label is None else label)


def _limits(option: Option) -> str:
    has_upper = option.le is not None and option.le < _UNLIMITED
    lower = f"above {option.gt:g}" if option.gt is not None else f"{option.ge:g}" if option.ge is not None else ""
    if not lower or (option.ge is not None and option.ge < -_UNLIMITED):
        return ""
    if not has_upper:
        return f"at least {lower}"
    return f"{lower} {'and at most' if option.gt is not None else 'to'} {option.le:g}"
