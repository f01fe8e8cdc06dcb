"""JSON Schemas by keyword, after the specification of draft 2020-12, that `GrammarCompiler` supports.

Tests validate outputs against them; `bench.grammar_engines` counts how many an engine supports.
"""

from typing import Any

Schema = dict[str, Any] | bool


def _object(**properties: Schema) -> dict[str, Any]:
    """Return the schema of an object with these properties, all of them required, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}

CASES: dict[str, Schema] = {
    # Types
    "type null": {"type": "null"},
    "type boolean": {"type": "boolean"},
    "type integer": {"type": "integer"},
    "type number": {"type": "number"},
    "type string": {"type": "string"},
    "type array": {"type": "array", "maxItems": 3},
    "type object": {"type": "object"},
    "type list": {"type": ["integer", "null", "boolean"]},
    "type list with keywords of each": {"type": ["string", "integer"], "maxLength": 4, "minimum": 10, "maximum": 20},
    "type list with null": {"type": ["string", "null"], "minLength": 4, "maxLength": 6},
    "no type": {"minimum": 5, "maximum": 6, "maxLength": 3, "maxItems": 2},
    "empty schema": {},
    "true": True,
    "annotations": {
        "title": "T",
        "description": "D",
        "default": 1,
        "examples": [2],
        "$comment": "C",
        "type": "boolean",
    },
    # Enumerations
    "enum of strings": {"enum": ["red", "green", "blue"]},
    "enum of all types": {"enum": ["a", 1, 2.5, True, None, [1, 2], {"k": "v"}]},
    "enum with type": {"type": "string", "enum": ["a", "b"]},
    "enum with prefixes": {"enum": ["a", "ab", "abc"]},
    "enum of texts that do not fit": {"enum": ["a", "bbb", 3], "type": "string", "minLength": 2},
    "enum of 300": {"enum": [f"item {index}" for index in range(300)]},
    "enum of unicode": {"enum": ["größer", "日本語", "🙂", "naïve\n", 'a"b\\c', "\u2028", "\x01"]},
    "const string": {"const": "fixed"},
    "const object": {"const": {"a": [1, {"b": None}]}},
    "const number": {"const": -0.5},
    # Objects
    "properties": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}},
    "required": _object(name={"type": "string"}, age={"type": "integer"}),
    "required of some": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "null"}, "c": {"type": "boolean"}},
        "required": ["c"],
        "additionalProperties": False,
    },
    "required out of order": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "null"}},
        "required": ["b", "a"],
        "additionalProperties": False,
    },
    "required without properties": {"type": "object", "required": ["x", "y"]},
    "required beside properties": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a", "z"]},
    "no properties allowed": {"type": "object", "additionalProperties": False},
    "additionalProperties true": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": True,
    },
    "additionalProperties schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": {"type": "boolean"},
    },
    "additionalProperties alone": {"type": "object", "additionalProperties": {"type": "integer"}},
    "patternProperties": {
        "type": "object",
        "patternProperties": {"^n_[a-z]+$": {"type": "integer"}},
        "additionalProperties": False,
    },
    "patternProperties of two": {
        "type": "object",
        "patternProperties": {"^a": {"type": "integer"}, "^b": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "patternProperties and properties": {
        "type": "object",
        "properties": {"id": {"type": "integer"}},
        "patternProperties": {"^x_": {"type": "null"}},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
    },
    "property false": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": False},
        "required": ["a"],
        "additionalProperties": False,
    },
    "property true": _object(a=True),
    "unicode property names": _object(
        **{"größe": {"type": "integer"}, "名前": {"type": "null"}, "🙂": {"type": "boolean"}}
    ),
    "property names to escape": _object(
        **{'a"b': {"type": "null"}, "c\\d": {"type": "null"}, "e\nf": {"type": "null"}}
    ),
    "empty property name": _object(**{"": {"type": "integer"}}),
    "prefixes among property names": _object(a={"type": "null"}, ab={"type": "null"}, abc={"type": "null"}),
    "many optional properties": {
        "type": "object",
        "properties": {f"p{index}": {"type": "boolean"} for index in range(12)},
        "additionalProperties": False,
    },
    "minProperties": {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2},
    "maxProperties": {"type": "object", "additionalProperties": {"type": "null"}, "maxProperties": 1},
    "nested objects": _object(a=_object(b=_object(c={"type": "integer"}))),
    # Arrays
    "items": {"type": "array", "items": {"type": "integer"}},
    "minItems": {"type": "array", "items": {"type": "boolean"}, "minItems": 3},
    "maxItems": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    "minItems and maxItems": {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 4},
    "exact number of items": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3},
    "empty array": {"type": "array", "maxItems": 0},
    "prefixItems": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False},
    "prefixItems and items": {
        "type": "array",
        "prefixItems": [{"type": "string", "maxLength": 3}],
        "items": {"type": "integer"},
        "minItems": 2,
        "maxItems": 4,
    },
    "prefixItems required": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "null"}],
        "items": False,
        "minItems": 2,
    },
    "arrays of arrays": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        "maxItems": 2,
    },
    "arrays of objects": {"type": "array", "items": _object(x={"type": "integer"}), "minItems": 1, "maxItems": 3},
    "items of draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}, {"type": "null"}],
        "additionalItems": False,
    },
    # Strings
    "minLength": {"type": "string", "minLength": 5},
    "maxLength": {"type": "string", "maxLength": 4},
    "minLength and maxLength": {"type": "string", "minLength": 3, "maxLength": 5},
    "empty string": {"type": "string", "maxLength": 0},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "pattern without anchors": {"type": "string", "pattern": "[0-9]{2}"},
    "pattern with an anchor": {"type": "string", "pattern": "^ab"},
    "pattern of alternatives": {"type": "string", "pattern": "^(foo|ba[rz])+$"},
    "pattern of alternative anchors": {"type": "string", "pattern": "^a$|^b$"},
    "pattern of classes": {"type": "string", "pattern": "^\\d{1,3}\\s\\w{1,3}$"},
    "pattern of unicode": {"type": "string", "pattern": "^[äöü]{1,3}$"},
    "pattern with quotes": {"type": "string", "pattern": '^"\\\\{1,2}"$'},
    "pattern and maxLength": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5},
    "pattern and format": {"type": "string", "format": "date", "pattern": "^2020"},
    "format date-time": {"type": "string", "format": "date-time"},
    "format date": {"type": "string", "format": "date"},
    "format time": {"type": "string", "format": "time"},
    "format duration": {"type": "string", "format": "duration"},
    "format email": {"type": "string", "format": "email"},
    "format hostname": {"type": "string", "format": "hostname"},
    "format ipv4": {"type": "string", "format": "ipv4"},
    "format ipv6": {"type": "string", "format": "ipv6"},
    "format uuid": {"type": "string", "format": "uuid"},
    "format uri": {"type": "string", "format": "uri"},
    # Numbers
    "minimum and maximum of integers": {"type": "integer", "minimum": -3, "maximum": 12},
    "minimum of integers": {"type": "integer", "minimum": 18},
    "maximum of integers": {"type": "integer", "maximum": -5},
    "exclusive bounds of integers": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    "bounds of several digits": {"type": "integer", "minimum": 95, "maximum": 1203},
    "minimum and maximum of numbers": {"type": "number", "minimum": 0, "maximum": 1},
    "exclusive bounds of numbers": {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 2.25},
    "fractional bounds of integers": {"type": "integer", "minimum": 0.5, "maximum": 4.5},
    "multipleOf": {"type": "integer", "multipleOf": 5},
    "multipleOf with bounds": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 50},
    "multipleOf a fraction": {"type": "number", "multipleOf": 0.25},
    "multipleOf and multipleOf": {
        "allOf": [{"type": "integer", "multipleOf": 3}, {"multipleOf": 5}],
        "minimum": 1,
        "maximum": 40,
    },
    # Combinations
    "anyOf": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 5}]},
    "anyOf of a short and a long one": {"anyOf": [{"type": "boolean"}, {"type": "string", "format": "uuid"}]},
    "anyOf of objects": {"anyOf": [_object(a={"type": "integer"}), _object(a={"type": "boolean"}, b={"type": "null"})]},
    "anyOf beside properties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
        "anyOf": [{"properties": {"a": {"minimum": 5}}}, {"properties": {"a": {"maximum": -5}}}],
    },
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "boolean"}, {"type": "null"}]},
    "oneOf by constant": {
        "oneOf": [
            _object(kind={"const": "circle"}, radius={"type": "number"}),
            _object(kind={"const": "square"}, side={"type": "number"}),
        ]
    },
    "allOf": {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 8}]},
    "allOf of objects": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    "allOf of patterns": {"allOf": [{"type": "string", "pattern": "^a"}, {"pattern": "b$"}, {"maxLength": 6}]},
    "allOf of anyOf": {
        "allOf": [
            {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        ]
    },
    "anyOf of required": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        "additionalProperties": False,
    },
    # References
    "$ref": {"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 3},
    "$ref to definitions": {"definitions": {"n": {"type": "boolean"}}, "$ref": "#/definitions/n"},
    "$ref beside keywords": {"$defs": {"n": {"type": "integer", "minimum": 3}}, "$ref": "#/$defs/n", "maximum": 7},
    "$ref to a property": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"$ref": "#/properties/a"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "$ref with escapes": {"$defs": {"a/b~c d": {"type": "null"}}, "$ref": "#/$defs/a~1b~0c%20d"},
    "$ref to the root": {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
        "additionalProperties": False,
    },
    "$ref to an anchor": {"$defs": {"n": {"$anchor": "here", "type": "boolean"}}, "$ref": "#here"},
    "$ref to an $id": {"$id": "http://example.com/s", "$defs": {"n": {"$id": "n", "type": "null"}}, "$ref": "n"},
    "$ref beside properties": {
        "$defs": {"base": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}},
        "$ref": "#/$defs/base",
        "properties": {"b": {"type": "boolean"}},
        "required": ["b"],
    },
    "$ref that recurses": _TREE,
    "$ref of two that recurse": {
        "$defs": {
            "list": {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 2},
            "item": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/list"}]},
        },
        "$ref": "#/$defs/list",
    },
}
