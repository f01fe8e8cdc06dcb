"""From the bytes of a body to a request, or to an error with the field, its value and the type that it must have."""

import re
from typing import Any, TypeVar

import msgspec

from dispec.serving.api.request_fields import refuse_unsupported
from dispec.serving.http.errors import ApiError

T = TypeVar("T")

_KINDS = {
    "float": "a number",
    "int": "an integer",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_VALIDATION = re.compile(r"(?P<what>.*?)(?: - at `(?P<key>key` in `)?\$(?P<path>.*)`)?", re.DOTALL)
_EXPECTED = re.compile(r"Expected `([^`]+)`")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_MAX_SHOWN = 60  # characters of a value in an error


def decode_body(body: bytes, form: type[T]) -> T:
    """Return the body as a struct. Raises ApiError with status 400, or InvalidField."""
    try:
        request = _decode(body, form)
    except msgspec.ValidationError as error:
        raise _explain(str(error), body) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except (msgspec.DecodeError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        said = "the body is empty" if not body else f"the body is not JSON: {error}"
        raise ApiError(400, said, code="invalid_json") from None
    refuse_unsupported(body, request)
    return request


def format_value(value: Any) -> str:
    """Return a value for an error: its JSON, cut to 60 characters."""
    try:
        text = str(value) if type(value) is int else msgspec.json.encode(value).decode()
    except (OverflowError, ValueError, RecursionError, msgspec.MsgspecError):
        return "too large"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _decode(body: bytes, form: type[T]) -> T:
    """Decode JSON in which integers may be written as 312.0, as JSON Schema and many clients have it."""
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError as error:
        if "got `float`" not in str(error):
            raise
        try:
            value = msgspec.json.decode(body)
        except (msgspec.ValidationError, RecursionError):  # a worse mistake further on
            raise error from None
        if not isinstance(value, dict):
            raise
        return msgspec.convert({name: _whole(item) for name, item in value.items()}, type=form, str_keys=True)


def _whole(value: Any) -> Any:
    """Return whole numbers as integers, in lists too. Objects keep theirs, because chat templates print them."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return [_whole(item) for item in value] if isinstance(value, list) else value


def _explain(said: str, body: bytes) -> ApiError:
    """Return msgspec's error in our words. The first step of the path to the wrong value is the error's `param`."""
    found = _VALIDATION.fullmatch(said)
    assert found is not None
    what, path = found["what"], (found["path"] or "").removeprefix(".")
    field = next((name for name, _ in _STEP.findall(f".{path}")), None) if path else None
    place = path or "the body"
    if "missing required field" in what:
        name = what.rsplit("`", 2)[-2]
        return _wrong(field or name, f"{f'{path}.' if path else ''}{name} is missing")
    expected = _EXPECTED.match(what)
    if expected is None:  # "Number out of range"
        return _wrong(field, f"{place} is not valid: {what[:1].lower()}{what[1:]}")
    kinds = [_KINDS.get(kind.strip(), kind.strip()) for kind in expected[1].split("|")]
    must_be = "must be " + " or ".join(kind for kind in kinds if kind != "null" or len(kinds) == 1)
    try:
        value = _value_at(body, path)
    except (RecursionError, ValueError, LookupError):  # a worse mistake further on
        return _wrong(field, f"{place} {must_be}")
    if not isinstance(value, dict) or not (found["key"] or path.endswith("[...]")):
        return _wrong(field, f"{place} is {format_value(value)}, {must_be}")
    # An entry of `logit_bias`, the one field whose keys are data: msgspec does not name them.
    path = path.removesuffix("[...]")
    if found["key"]:
        key = next((key for key in value if not re.fullmatch(r"-?(0|[1-9]\d*)", key)), "")
        return _wrong(field, f"{path} has the key {format_value(key)}, {must_be}")
    key, item = next(((key, item) for key, item in value.items() if type(item) not in (int, float)), ("", None))
    return _wrong(field, f"{path}.{key:.60} is {format_value(item)}, {must_be}")


def _wrong(field: str | None, message: str) -> ApiError:
    return ApiError(400, message, param=field)


def _value_at(body: bytes, path: str) -> Any:
    value = msgspec.json.decode(body)
    for name, index in _STEP.findall(f".{path}" if path else ""):
        if index == "...":
            return value
        value = value[name] if name else value[int(index)]
    return value
