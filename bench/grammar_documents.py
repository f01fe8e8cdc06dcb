"""Schemas of several kinds, small to large, each with a document."""

from typing import Any

from dispec.bench import json_schemas


def documents() -> dict[str, tuple[dict[str, Any], Any]]:
    """Return schemas, each with a document that fits it."""
    small = json_schemas.CASES["required"]
    address = {
        "street": {"type": "string"},
        "city": {"type": "string"},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    }
    medium = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "email": {"type": "string", "format": "email"},
            "born": {"type": "string", "format": "date"},
            "role": {"enum": ["admin", "editor", "reader"]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
            "address": {
                "type": "object",
                "properties": address,
                "required": list(address),
                "additionalProperties": False,
            },
        },
        "required": ["name", "email", "born", "role", "tags", "address"],
        "additionalProperties": False,
    }
    person = {
        "name": "Ada Lovelace",
        "email": "ada@example.com",
        "born": "1815-12-10",
        "role": "editor",
        "tags": ["analyst", "poet"],
        "address": {"street": "12 St James's Square", "city": "London", "zip": "10115"},
    }
    large = {
        "type": "object",
        "properties": {f"section_{index}": medium for index in range(40)},
        "required": [f"section_{index}" for index in range(3)],
        "additionalProperties": False,
    }
    patterns = {
        "phone": ("^\\+[1-9][0-9]{6,14}$", "+4915112345678"),
        "plate": ("^[A-ZÄÖÜ]{1,3}-[A-Z]{1,2} [0-9]{1,4}$", "B-AB 1234"),
        "version": ("^(0|[1-9]\\d*)\\.(0|[1-9]\\d*)\\.(0|[1-9]\\d*)(-[0-9a-z.-]+)?$", "1.22.333-rc.1"),
        "path": ("^(/[a-zA-Z0-9_.-]{1,32}){1,16}$", "/usr/local/share/dispec/models"),
        "words": ("^([a-z]{1,12} ){2,9}[a-z]{1,12}$", "the quick brown fox jumps over lazy dogs"),
    }
    regexes = {
        "type": "object",
        "properties": {name: {"type": "string", "pattern": pattern} for name, (pattern, _) in patterns.items()},
        "required": list(patterns),
        "additionalProperties": False,
    }
    tree = {"value": 1, "children": [{"value": 2, "children": [{"value": 3}, {"value": 4}]}, {"value": 5}]}
    names = [f"category {index * 7919 % 1000:03} of products" for index in range(1000)]
    assert isinstance(small, dict)
    recursive = json_schemas.CASES["$ref that recurses"]
    assert isinstance(recursive, dict)
    return {
        "small": (small, {"name": "Ada Lovelace", "age": 36}),
        "medium": (medium, person),
        "large": (large, {f"section_{index}": person for index in range(3)}),
        "recursive": (recursive, tree),
        "regex-heavy": (regexes, {name: text for name, (_, text) in patterns.items()}),
        "enum of 1,000": ({"enum": names}, names[517]),
    }
