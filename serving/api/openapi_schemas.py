"""Parts of the OpenAPI document beyond the types of fields: messages, rules between fields, examples.

`tests/test_openapi.py` compares the schemas with the server's responses to bodies that they allow and forbid.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct

from dispec.serving.api.prompts import RESERVED_TEMPLATE_NAMES
from dispec.serving.settings import MAX_PROMPTS

Schema = dict[str, Any]

_ROLES = ["system", "developer", "user", "assistant", "tool", "function"]


class TextPart(Struct, kw_only=True):
    type: Annotated[str, Meta(examples=["text"])] = "text"
    text: str


class FunctionCall(Struct):
    name: str
    arguments: Annotated[str | dict[str, Any], Meta(description="An object, or its JSON.")] = ""


class ToolCall(Struct, kw_only=True):
    id: str = ""
    type: Annotated[str, Meta(examples=["function"])] = "function"
    function: FunctionCall


class RequestMessage(Struct):
    """A turn of a conversation. Further fields go to the model's chat template as they are."""

    role: Annotated[str, Meta(examples=_ROLES, description="Others work if the model's chat template knows them.")]
    content: Annotated[
        str | list[str | TextPart] | None, Meta(description="A text, or text parts, which are joined by line breaks.")
    ] = None
    tool_calls: list[ToolCall] | None = None


def _with(**fields: Any) -> Schema:
    """Return the schema of a body that has each of the fields, with that value."""
    return {"required": [*fields], "properties": {name: {"const": value} for name, value in fields.items()}}


def _without(field: str) -> Schema:
    """Return the schema of a body that does not have the field, or has null there."""
    return {"properties": {field: {"type": "null"}}}


def _several(prompt: Schema) -> Schema:
    return {"type": "array", "items": prompt, "minItems": 1, "maxItems": MAX_PROMPTS}


_TEXT: Schema = {"type": "string", "minLength": 1}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_OPENS_OR_CONTINUES = {"not": _with(add_generation_prompt=True, continue_final_message=True)}
_OF_STREAMS = [
    {"anyOf": [_without("stream_options"), _with(stream=True)]},
    {"anyOf": [_without("prompt_logprobs"), {"not": _with(stream=True)}]},
]
_RULES: dict[str, list[Schema]] = {
    "RequestMessage": [
        {
            "anyOf": [
                {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
                {"required": ["content"], "properties": {"role": {"const": "assistant"}}},
                {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
            ]
        }
    ],
    "ChatRequest": [
        *_OF_STREAMS,
        _OPENS_OR_CONTINUES,
        {"anyOf": [{"properties": {"top_logprobs": {"enum": [0, None]}}}, _with(logprobs=True)]},
    ],
    "CompletionRequest": [
        *_OF_STREAMS,
        {"properties": {"prompt": {"anyOf": [_TEXT, _TOKENS, _several(_TEXT), _several(_TOKENS)]}}},
        {"anyOf": [{"properties": {"max_tokens": {"not": {"const": 0}}}}, _with(echo=True)]},
    ],
    "TokenizeRequest": [
        _OPENS_OR_CONTINUES,
        {
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
            ]
        },
    ],
}

_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
_TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
EXAMPLES: dict[str, dict[str, Schema]] = {
    "ChatRequest": {
        "A question": {"messages": _QUESTION, "max_tokens": 64},
        "A stream with its usage": {
            "messages": [{"role": "system", "content": "Be brief."}, *_QUESTION],
            "max_tokens": 64,
            "temperature": 0.7,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "The beginning of an answer, to go on with": {
            "messages": [*_QUESTION, {"role": "assistant", "content": "The capital of"}],
            "continue_final_message": True,
            "max_tokens": 16,
        },
    },
    "CompletionRequest": {
        "A text to go on with": {"prompt": "Once upon a time", "max_tokens": 32, "seed": 7},
        "The log-probabilities of a text": {"prompt": "The sea is blue.", "max_tokens": 0, "echo": True, "logprobs": 1},
        "Several prompts": {"prompt": ["One, two,", "Red, green,"], "max_tokens": 8, "temperature": 0, "stop": ["\n"]},
        "Token ids": {"prompt": [40, 41, 42], "max_tokens": 8, "top_k": 20},
    },
    "MessagesRequest": {
        "A question": {"messages": _QUESTION, "max_tokens": 64, "system": "Be brief."},
        "A tool": {"messages": _QUESTION, "max_tokens": 64, "tools": [_TOOL], "tool_choice": {"type": "any"}},
    },
    "CountTokensRequest": {"A question": {"messages": _QUESTION, "system": "Be brief."}},
    "GenerateRequest": {"A text to go on with": {"prompt": "The quick brown fox", "max_new_tokens": 16}},
    "TokenizeRequest": {
        "A text": {"prompt": "The quick brown fox", "return_token_strs": True},
        "Messages in the chat template": {"messages": _QUESTION},
    },
    "DetokenizeRequest": {"Token ids": {"tokens": [40, 41, 42]}},
}


def complete_schemas(schemas: dict[str, Schema], model_names: list[str], slo_names: list[str]) -> None:
    """Add the rules, and the names that depend on the server's options, to msgspec's schemas."""
    for name, rules in _RULES.items():
        schemas[name].setdefault("allOf", []).extend(rules)
    for name in EXAMPLES:
        fields = schemas[name]["properties"]
        if model_names and "model" in fields:
            fields["model"] = {"enum": [*model_names, None], "default": None}
        if "slo" in fields:
            fields["slo"] |= {"enum": [*slo_names, None]}
        if "chat_template_kwargs" in fields:
            fields["chat_template_kwargs"]["propertyNames"]["not"] = {"enum": sorted(RESERVED_TEMPLATE_NAMES)}
