"""Checks a JSON Schema before it is compiled, and writes it in the form that llguidance enforces as a whole."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from dispec.engine.structured_output.finite_schema import has_finite_value, resolve

_MAX_DEPTH = 100  # of JSON values; llguidance's reader stops at 128
_MAX_PROPERTIES = 1000  # of one object: each optional one is 4 items in a row of the parser
_MAX_EXACT = 2**53  # largest bound of a number that llguidance keeps exactly

_DIALECTS = ("draft-04/schema", "draft-06/schema", "draft-07/schema", "draft/2019-09/schema", "draft/2020-12/schema")
_SCHEMAS = ("items", "additionalItems", "additionalProperties")  # keywords with a schema, a boolean included
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPPINGS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_PLAIN = (
    "type", "enum", "const", "$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems",
    "minLength", "maxLength", "pattern", "format",
)  # fmt: skip
_NAMES = ("$id", "$anchor")  # of parts, for references
# With the values that restrict nothing.
_NOT_ENFORCED: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,), "unevaluatedProperties": (True, {}), "unevaluatedItems": (True, {}), "minContains": (0,),
    "propertyNames": (True, {}), "not": (False,), "if": (), "then": (), "else": (), "contains": (),
    "maxContains": (), "dependentRequired": ({},), "dependentSchemas": ({},), "dependencies": ({},),
    "$dynamicRef": (), "$recursiveRef": (),
}  # fmt: skip

_LABEL = "[A-Za-z0-9](?:-?[A-Za-z0-9]){0,15}"  # without "--", which only names in Punycode have
_HOSTNAME = rf"{_LABEL}(?:\.{_LABEL}){{0,6}}"
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_ATOM = "[A-Za-z0-9!#$%&'*+=?^_`{|}~-]{1,15}"
# llguidance's own allow 30 February, a second 60 at any minute, and parts of addresses that are too long.
_FORMAT_PATTERNS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "hostname": _HOSTNAME,
    "email": rf"{_ATOM}(?:\.{_ATOM}){{0,3}}@{_HOSTNAME}",
}
_FORMATS = ("duration", "ipv4", "ipv6", "uuid", "uri")
# Of pydantic and of OpenAPI: any text.
_FORMATS_OF_ANY_TEXT = ("password", "binary", "path", "file-path", "directory-path")
_FORMATS_OF_NUMBERS = ("int32", "int64", "float", "double")


class SchemaError(ValueError):
    """A schema cannot be enforced. pointer: JSON pointer of the wrong part."""

    def __init__(self, pointer: str, message: str) -> None:
        super().__init__(message)
        self.pointer = pointer


def read_schema(text: str) -> Any:
    """Return the JSON value of a text. Raises SchemaError for other texts, NaN and a repeated key included."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise SchemaError("", f"is nested more than {_MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise SchemaError("", f"is not JSON: {error}") from None


def enforceable_schema(schema: Any, *, refuses_additional: bool = False) -> Any:
    """Return the schema without annotations, as llguidance enforces it.

    refuses_additional: objects without `additionalProperties` have no other properties than those listed.
    Raises SchemaError for keywords that cannot be enforced and for references out of the document.
    """
    writer = _Writer(refuses_additional)
    written = writer.schema(schema, "", 0)
    if not writer.has_names:  # llguidance finds names in the document, and reads no other document
        references = _references(written, "")
        for pointer, reference in references:
            _check_reference(written, pointer, reference)
        if references and not _has_finite_value(written):
            pointer, reference = references[0]
            raise SchemaError(
                pointer, f"is {_shown(reference)}, with which every value refers to itself without an end"
            )
    return written


def patterns_of(schema: Any, pointer: str = "") -> list[tuple[str, str]]:
    """Return the patterns of a schema, each with its JSON pointer."""
    found: list[tuple[str, str]] = []
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            found += patterns_of(item, f"{pointer}/{index}")
    elif isinstance(schema, dict):
        for name, value in schema.items():
            place = f"{pointer}/{_escape(name)}"
            if name == "pattern" and isinstance(value, str):
                found.append((place, value))
            elif name == "patternProperties" and isinstance(value, dict):
                found += [(f"{place}/{_escape(key)}", key) for key in value]
            found += patterns_of(value, place)
    return found


class _Writer:
    """Writes schemas anew, part by part. has_names: the document has parts with an `$id` or an `$anchor`."""

    def __init__(self, refuses_additional: bool) -> None:
        self.has_names = False
        self._refuses_additional = refuses_additional

    def schema(self, schema: Any, pointer: str, depth: int) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise SchemaError(pointer, f"is {_shown(schema)}, must be an object or a boolean")
        _check_depth(pointer, depth)
        written: dict[str, Any] = {}
        for name, value in schema.items():
            place = f"{pointer}/{_escape(name)}"
            if name in _SCHEMAS:
                # Before 2020-12, `items` may be a list.
                read: Callable = self._list if name == "items" and isinstance(value, list) else self.schema
                written[name] = read(value, place, depth + 1)
            elif name in _LISTS_OF_SCHEMAS:
                written[name] = self._list(value, place, depth + 1)
            elif name in _MAPPINGS_OF_SCHEMAS:
                written[name] = self._mapping(value, place, depth + 1)
            elif name in _PLAIN or name in _BOUNDS:
                _check_value(name, value, place, depth + 1)
                written[name] = value
            elif name in _NAMES and isinstance(value, str):
                self.has_names |= name == "$anchor" or bool(pointer)
                written[name] = value
            else:
                _check_other(name, value, place)
        _write_format(written, f"{pointer}/format")
        if self._refuses_additional and "properties" in written:
            written.setdefault("additionalProperties", False)
        return written

    def _list(self, value: Any, pointer: str, depth: int) -> list[Any]:
        if not isinstance(value, list):
            raise SchemaError(pointer, f"is {_shown(value)}, must be a list of schemas")
        return [self.schema(item, f"{pointer}/{index}", depth + 1) for index, item in enumerate(value)]

    def _mapping(self, value: Any, pointer: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise SchemaError(pointer, f"is {_shown(value)}, must be an object of schemas")
        if len(value) > _MAX_PROPERTIES and not pointer.endswith(("/$defs", "/definitions")):
            raise SchemaError(pointer, f"holds {len(value)} properties, must be at most {_MAX_PROPERTIES}")
        return {name: self.schema(item, f"{pointer}/{_escape(name)}", depth + 1) for name, item in value.items()}


def _check_value(name: str, value: Any, pointer: str, depth: int) -> None:
    if name == "$ref" and not isinstance(value, str):
        raise SchemaError(pointer, f"is {_shown(value)}, must be a text")
    if name in _BOUNDS:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SchemaError(pointer, f"is {_shown(value)}, must be a number")
        if abs(value) > _MAX_EXACT:
            raise SchemaError(pointer, f"is {_shown(value)}, must be between -2**53 and 2**53")
        if name == "multipleOf" and value <= 0:
            raise SchemaError(pointer, f"is {_shown(value)}, must be above 0")
    if name == "format" and not isinstance(value, str):
        raise SchemaError(pointer, f"is {_shown(value)}, must be a text")
    if name in ("enum", "const"):
        _check_nesting(value, pointer, depth)


def _check_other(name: str, value: Any, pointer: str) -> None:
    """Raise SchemaError for a keyword that restricts values, and that is not enforced. Others are annotations."""
    if name in _NOT_ENFORCED and not any(value is known or value == known != 0 for known in _NOT_ENFORCED[name]):
        raise SchemaError(pointer, "is a keyword that cannot be enforced: leave it out")
    if name == "$schema":
        dialect = value.removesuffix("#").split("json-schema.org/")[-1] if isinstance(value, str) else None
        if dialect not in _DIALECTS:
            known = "https://json-schema.org/draft/2020-12/schema or an earlier draft's"
            raise SchemaError(pointer, f"is {_shown(value)}, must be {known}")


def _write_format(schema: dict[str, Any], pointer: str) -> None:
    """Replace a format by a pattern where llguidance's is too wide, and drop one that restricts nothing."""
    name = schema.get("format")
    if name is None or name in _FORMATS:
        return
    del schema["format"]
    if name in _FORMATS_OF_ANY_TEXT or name in _FORMATS_OF_NUMBERS:
        return
    if name not in _FORMAT_PATTERNS:
        known = ", ".join((*_FORMAT_PATTERNS, *_FORMATS))
        raise SchemaError(pointer, f"is {_shown(name)}, must be one of {known}")
    pattern = f"^(?:{_FORMAT_PATTERNS[name]})$"
    if "pattern" not in schema:
        schema["pattern"] = pattern
    else:
        schema["allOf"] = [*schema.get("allOf", ()), {"pattern": pattern}]


def _references(schema: Any, pointer: str) -> list[tuple[str, str]]:
    """Return the references of a written schema, each with its JSON pointer."""
    found: list[tuple[str, str]] = []
    if not isinstance(schema, dict):
        return found
    for name, value in schema.items():
        place = f"{pointer}/{_escape(name)}"
        if name == "$ref":
            found.append((place, value))
        elif name in _MAPPINGS_OF_SCHEMAS:
            for key, item in value.items():
                found += _references(item, f"{place}/{_escape(key)}")
        elif name in _LISTS_OF_SCHEMAS or (name in _SCHEMAS and isinstance(value, list)):
            for index, item in enumerate(value):
                found += _references(item, f"{place}/{index}")
        elif name in _SCHEMAS:
            found += _references(value, place)
    return found


def _check_reference(root: Any, pointer: str, reference: str) -> None:
    """Raise SchemaError for a reference to nothing."""
    if reference != "#" and not reference.startswith("#/"):
        raise SchemaError(pointer, f"is {_shown(reference)}, must point into this schema, as in '#/$defs/name'")
    try:
        resolve(root, reference)
    except LookupError:
        raise SchemaError(pointer, f"is {_shown(reference)}, which points at no schema of this document") from None


def _has_finite_value(schema: Any) -> bool:
    try:
        return has_finite_value(schema)
    except RecursionError:
        raise SchemaError("", "has a chain of references that is too long") from None


def _check_nesting(value: Any, pointer: str, depth: int) -> None:
    _check_depth(pointer, depth)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for item in items:
        _check_nesting(item, pointer, depth + 1)


def _check_depth(pointer: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise SchemaError(pointer, f"is nested more than {_MAX_DEPTH} levels deep")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _escape(name: str) -> str:
    """Return a step of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if isinstance(value, str | int | float | bool | None) else type(value).__name__
