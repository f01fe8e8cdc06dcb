"""The structure that a request asks of its output, from OpenAI's `response_format` and vLLM's fields."""

import json
from collections.abc import Mapping
from typing import Any

from dispec.engine.errors import InvalidField
from dispec.engine.structured_output.structured_outputs import JSON_OPTIONS, STRUCTURE_KINDS, StructuredOutputs
from dispec.serving.api.protocol import SamplingRequest
from dispec.serving.api.request_body import format_value

# vLLM's older fields, and the field of `StructuredOutputs` that each of them sets.
_OLDER_NAMES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "structural_tag": "structural_tag",
}
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")


def requested_structure(request: SamplingRequest) -> StructuredOutputs | None:
    """Return the structure of a request; None for free text.

    A schema holds whether it is `strict` or not. Raises InvalidField for a wrong form, and for two fields that exclude
    each other.
    """
    found: dict[str, StructuredOutputs] = {}
    if (given := request.structured_outputs) is not None and given != {}:
        known = {name: value for name, value in given.items() if value is not None}
        for one in known:
            if one not in (*STRUCTURE_KINDS, *JSON_OPTIONS):
                said = f"structured_outputs has {one!r:.50}, must have one of {', '.join(STRUCTURE_KINDS)}"
                raise InvalidField("structured_outputs", said)
        found["structured_outputs"] = StructuredOutputs.from_mapping(known)
    for name, field in _OLDER_NAMES.items():
        if (value := getattr(request, name)) not in (None, False):
            found[name] = StructuredOutputs(**{field: value, "origin": name})
    if (answer := _of_response_format(request.response_format)) is not None:
        found["response_format"] = answer
    if len(found) > 1:
        first, second, *_ = found
        raise InvalidField(first, f"{first} and {second} exclude each other: give one of them")
    structure = next(iter(found.values()), None)
    # Its "lenient" ignores keywords that are not enforced. Grammars of tools have it, clients' must not.
    if structure is not None and structure.grammar is not None and "x-guidance" in structure.grammar:
        raise structure.error("holds 'x-guidance', an option of the grammar engine, must not")
    return structure


def _of_response_format(given: Mapping[str, Any] | None) -> StructuredOutputs | None:
    name = "response_format"
    kind = "text" if given is None else given.get("type")
    if given is None or kind == "text" or given == {}:
        return None
    if kind not in _FORMATS:
        raise InvalidField(name, f"{name}.type is {format_value(kind)}, must be one of {', '.join(_FORMATS)}")
    if kind == "json_object":
        return StructuredOutputs(json_object=True, origin=name)
    if kind == "structural_tag":
        return StructuredOutputs(structural_tag=given, origin=name)
    schema = given.get("json_schema")
    if not isinstance(schema, Mapping):
        raise InvalidField(name, f"{name}.json_schema is {format_value(schema)}, must be an object with a schema")
    strict = schema.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidField(name, f"{name}.json_schema.strict is {format_value(strict)}, must be a boolean")
    place = f"{name}.json_schema.schema"
    content = schema.get("schema")
    if content is None:
        raise InvalidField(name, f"{place} is missing")
    if not isinstance(content, Mapping | bool):
        raise InvalidField(name, f"{place} is {format_value(content)}, must be an object")
    return StructuredOutputs(json=json.dumps(content, ensure_ascii=False), origin=place)
