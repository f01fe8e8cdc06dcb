"""Parts of the OpenAPI document about Anthropic's API: rules between fields, and examples.

References to other messages, as from a tool's result to its call, are not in the rules.
"""

from typing import Any

Schema = dict[str, Any]


def _if_const(field: str, value: str, then: Schema) -> Schema:
    return {"if": {"properties": {field: {"const": value}}, "required": [field]}, "then": then}


def _given(*fields: str) -> Schema:
    """Return the schema of an object that has the fields, none of them null."""
    return {"required": [*fields], "properties": {field: {"not": {"type": "null"}} for field in fields}}


def _blocks(field: str, *types: str) -> Schema:
    """Return the schema of an object whose field may be a list of blocks of these types."""
    return {"properties": {field: {"items": {"properties": {"type": {"enum": [*types]}}}}}}


_OF_ALL: list[Schema] = [
    _blocks("system", "text"),
    {
        "anyOf": [
            {"properties": {"tool_choice": {"type": "null"}}},
            {"properties": {"tool_choice": {"properties": {"type": {"const": "none"}}}}},
            {"required": ["tools"], "properties": {"tools": {"type": "array", "minItems": 1}}},
        ]
    },
    {
        "anyOf": [
            {"properties": {"output_format": {"type": "null"}}},
            {"properties": {"output_config": {"properties": {"format": {"type": "null"}}}}},
        ]
    },
]
ANTHROPIC_RULES: dict[str, list[Schema]] = {
    "RequestTurn": [
        _if_const("role", "assistant", _blocks("content", "text", "tool_use", "thinking", "redacted_thinking")),
        _if_const("role", "system", _blocks("content", "text")),
        *(_if_const("role", role, _blocks("content", "text", "tool_result")) for role in ("user", "ctx", "msg")),
    ],
    "RequestBlock": [
        _if_const("type", "text", _given("text")),
        _if_const("type", "thinking", _given("thinking")),
        _if_const("type", "tool_use", _given("id", "name", "input")),
        _if_const("type", "tool_result", {"allOf": [_given("tool_use_id"), _blocks("content", "text")]}),
    ],
    "RequestTool": [
        _given("name", "input_schema"),
        {
            "properties": {
                "defer_loading": {"not": {"const": True}},
                "allowed_callers": {"anyOf": [{"not": {"minItems": 1}}, {"contains": {"const": "direct"}}]},
            }
        },
    ],
    "RequestToolChoice": [_if_const("type", "tool", _given("name"))],
    "RequestOutputConfig": [{"properties": {"task_budget": {"type": "null"}}}],
    "MessagesRequest": _OF_ALL,
    "CountTokensRequest": _OF_ALL,
}

_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
_TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ANTHROPIC_EXAMPLES: dict[str, dict[str, Schema]] = {
    "MessagesRequest": {
        "A question": {"messages": _QUESTION, "max_tokens": 64, "system": "Be brief."},
        "A tool": {"messages": _QUESTION, "max_tokens": 64, "tools": [_TOOL], "tool_choice": {"type": "auto"}},
    },
    "CountTokensRequest": {"A question": {"messages": _QUESTION, "system": "Be brief."}},
}
