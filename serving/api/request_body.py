"""Reads and decodes bodies. Errors name the field, its value and the type that it must have."""

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from litestar import Request

from dispec.serving.api.request_fields import refuse_unsupported
from dispec.serving.http.errors import ApiError, ClientLeft

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
_UNSUPPORTED = "unsupported_media_type"
_DISCARDED_BYTES = 64 * 2**20  # read past the limit, because clients read no response before they have sent all


async def read_body(request: Request, form: type[T], limit: int, timeout: float) -> T:
    """Return the body as a struct.

    Raises ApiError or InvalidField: status 415 for a body that is not plain JSON, 413 for more than `limit` bytes, 408
    for a body that takes more than `timeout` seconds to arrive, 400 for any other mistake.
    """
    _check_content(request)
    try:
        async with asyncio.timeout(timeout):
            body = await _read(request, limit)
    except TimeoutError:
        raise ApiError(408, f"the body took more than {timeout:g} s to arrive", code="timeout") from None
    return decode_body(body, form)


def _check_content(request: Request) -> None:
    """Raise ApiError unless the body is JSON in UTF-8, not compressed."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise ApiError(
            415,
            f"the body's content encoding is {coding!r:.50}, must be left out: bodies are not decompressed",
            code=_UNSUPPORTED,
            headers={"Accept-Encoding": "identity"},
        )
    kind, options = request.content_type
    charset = options.get("charset", "utf-8").lower()
    if not kind:
        # Command-line tools leave the type out. A web page must not, because its browser then sends no preflight.
        is_json = "origin" not in request.headers
    else:
        is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    if not is_json or charset not in ("utf-8", "utf8", "us-ascii"):
        given = request.headers.get("content-type", "missing")
        raise ApiError(
            415,
            f"the body's content type is {given:.100}, must be application/json in UTF-8",
            code=_UNSUPPORTED,
            headers={"Accept": "application/json"},
        )


async def _read(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part: bytes = message.get("body", b"")  # type: ignore[assignment]
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
        if not message.get("more_body", False) or size > limit + _DISCARDED_BYTES:
            break
    if size > limit:
        raise ApiError(413, f"the body holds {size} bytes or more, must be at most {limit}")
    return b"".join(parts)


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
    # An entry of `logit_bias`, the one field with data as keys: msgspec does not name them.
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
