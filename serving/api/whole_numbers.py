"""JSON to structs, where an integer may be written as 312.0, which is an integer to JSON Schema and to many clients."""

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def decode(body: bytes, form: type[T]) -> T:
    """Return the body as a struct. Raises what `msgspec.json.decode` does."""
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError as error:
        if "got `float`" not in str(error):
            raise
        try:
            value = msgspec.json.decode(body)
        except (msgspec.ValidationError, RecursionError):  # further on in the body, and worse
            raise error from None
        if not isinstance(value, dict):
            raise
        return msgspec.convert({name: _whole(item) for name, item in value.items()}, type=form, str_keys=True)


def _whole(value: Any) -> Any:
    """Return whole numbers as integers, in lists too. Objects are left as they are: templates show what is in them."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return [_whole(item) for item in value] if isinstance(value, list) else value
