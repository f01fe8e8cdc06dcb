"""Finds JSON Schemas of which every value refers to itself without an end."""

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote


def resolve(root: Any, reference: str) -> Any:
    """Return the part of a document that a local reference such as `#/$defs/name` points at. Raises LookupError."""
    target = root
    for step in unquote(reference.removeprefix("#")).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        try:
            target = target[int(key)] if isinstance(target, list) else target[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise LookupError(reference) from None
    return target


def has_finite_value(schema: Any) -> bool:
    """Return whether a schema, whose references all resolve, has a value of finite size as far as references decide.

    The least fixed point: a reference counts as endless until what it points at was found to have a finite value.
    """
    finite: set[str] = set()
    num_known = -1
    while num_known < len(finite):
        num_known = len(finite)
        if _is_finite(schema, _follower(schema, finite)):
            return True
    return False


def _follower(root: Any, finite: set[str]) -> Callable[[str], bool]:
    under_way: set[str] = set()

    def follow(reference: str) -> bool:
        if reference in finite:
            return True
        if reference in under_way:
            return False
        under_way.add(reference)
        if _is_finite(resolve(root, reference), follow):
            finite.add(reference)
        return reference in finite

    return follow


def _is_finite(schema: Any, follow: Callable[[str], bool]) -> bool:
    if not isinstance(schema, dict):
        return schema is not False
    if "$ref" in schema and not follow(schema["$ref"]):
        return False
    for name in ("anyOf", "oneOf"):
        if name in schema and not any(_is_finite(one, follow) for one in schema[name]):
            return False
    if not all(_is_finite(one, follow) for one in schema.get("allOf", ())):
        return False
    types = schema.get("type")
    kinds = [types] if isinstance(types, str) else types
    if kinds is None or "enum" in schema or "const" in schema:
        return True
    finders = {"object": _is_finite_object, "array": _is_finite_array}
    return any(kind not in finders or finders[kind](schema, follow) for kind in kinds)


def _is_finite_object(schema: dict[str, Any], follow: Callable[[str], bool]) -> bool:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    return all(_is_finite(properties.get(name, others), follow) for name in schema.get("required", ()))


def _is_finite_array(schema: dict[str, Any], follow: Callable[[str], bool]) -> bool:
    listed, others = schema.get("prefixItems", ()), schema.get("items", True)
    if isinstance(others, list):  # before 2020-12
        listed, others = others, schema.get("additionalItems", True)
    least = schema.get("minItems", 0)
    needed = [*listed[:least], *([others] if least > len(listed) else [])]
    return all(_is_finite(item, follow) for item in needed)
