"""From the bytes of a body to a request, or to an error that names the field, its value and what it must be."""

import re
from typing import Any, TypeVar

import msgspec

from dispec.serving.api.request_fields import refuse_unsupported
from dispec.serving.api.whole_numbers import decode
from dispec.serving.http.errors import ApiError, invalid

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


def decode_body(body: bytes, form: type[T]) -> T:
    """Return the body as a struct. Raises ApiError with status 400."""
    try:
        request = decode(body, form)
    except msgspec.ValidationError as error:
        raise _explain(str(error), body) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except (msgspec.DecodeError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        said = "the body is empty" if not body else f"the body is not JSON: {error}"
        raise ApiError(400, said, code="invalid_json") from None
    refuse_unsupported(body, request)
    return request


def shown(value: Any) -> str:
    """Return a value as an error shows it: JSON, cut to 60 characters."""
    try:
        text = str(value) if type(value) is int else msgspec.json.encode(value).decode()
    except (OverflowError, ValueError, RecursionError, msgspec.MsgspecError):
        return "too large"
    return text if len(text) <= 60 else f"{text[:60]}…"


def _explain(said: str, body: bytes) -> ApiError:
    """Return msgspec's words as ours. `param` is the first step of the path to the value that is wrong."""
    found = _VALIDATION.fullmatch(said)
    assert found is not None
    what, path = found["what"], (found["path"] or "").removeprefix(".")
    field = next((name for name, _ in _STEP.findall(f".{path}")), None) if path else None
    if "missing required field" in what:
        name = what.rsplit("`", 2)[-2]
        return invalid(field or name, f"{f'{path}.' if path else ''}{name} is missing")
    expected = _EXPECTED.match(what)
    if expected is None:  # "Number out of range"
        return invalid(field, f"{path or 'the body'} is not valid: {what[:1].lower()}{what[1:]}")
    kinds = [_KINDS.get(kind.strip(), kind.strip()) for kind in expected[1].split("|")]
    must_be = " or ".join(kind for kind in kinds if kind != "null" or len(kinds) == 1)
    try:
        value = _value_at(body, path)
    except (RecursionError, ValueError, LookupError):  # what comes after the first mistake may be worse
        return invalid(field, f"{path or 'the body'} must be {must_be}")
    if isinstance(value, dict) and (found["key"] or path.endswith("[...]")):
        return _explain_entry(field, path.removesuffix("[...]"), value, bool(found["key"]), must_be)
    return invalid(field, f"{path or 'the body'} is {shown(value)}, must be {must_be}")


def _explain_entry(field: str | None, path: str, entries: dict[str, Any], is_key: bool, must_be: str) -> ApiError:
    """Return the error of an entry of `logit_bias`, the one field whose keys are data; msgspec does not name them."""
    if is_key:
        key = next((key for key in entries if not re.fullmatch(r"-?(0|[1-9]\d*)", key)), "")
        return invalid(field, f"{path} has the key {shown(key)}, must be {must_be}")
    pairs = ((key, value) for key, value in entries.items() if type(value) not in (int, float))
    key, value = next(pairs, ("", None))
    return invalid(field, f"{path}.{key:.60} is {shown(value)}, must be {must_be}")


def _value_at(body: bytes, path: str) -> Any:
    value = msgspec.json.decode(body)
    for name, index in _STEP.findall(f".{path}" if path else ""):
        if index == "...":
            return value
        value = value[name] if name else value[int(index)]
    return value
