"""Parts of the OpenAPI document beyond the types of fields: messages, rules between fields, examples.

`tests/test_openapi.py` compares the schemas with the server's responses to bodies that they allow and forbid.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct

from dispec.serving.api.anthropic_schemas import ANTHROPIC_EXAMPLES, ANTHROPIC_RULES
from dispec.serving.api.prompts import RESERVED_TEMPLATE_NAMES
from dispec.serving.api.response_protocol import LOGPROBS
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


class ResponseInputPart(Struct):
    type: Annotated[str, Meta(examples=["input_text", "output_text", "refusal", "reasoning_text"])]
    text: str | None = None
    refusal: str | None = None


class ResponseInputItem(Struct):
    """A message, a function_call, a function_call_output, reasoning, or an item_reference to a stored item."""

    type: Annotated[str | None, Meta(examples=["message", "function_call", "function_call_output", "reasoning"])] = None
    id: str | None = None
    role: Annotated[str | None, Meta(examples=["user", "assistant", "system", "developer"])] = None
    content: str | list[ResponseInputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: Annotated[str | None, Meta(description="JSON.")] = None
    output: str | list[ResponseInputPart] | None = None


class ResponseFunctionTool(Struct):
    """A function that the answer may call. parameters: the JSON Schema of its arguments."""

    type: Annotated[str, Meta(extra_json_schema={"const": "function"})]
    name: Annotated[str, Meta(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def _with(**fields: Any) -> Schema:
    """Return the schema of a body that has each of the fields, with that value."""
    return {"required": [*fields], "properties": {name: {"const": value} for name, value in fields.items()}}


def _without(field: str) -> Schema:
    """Return the schema of a body that does not have the field, or has null there."""
    return {"properties": {field: {"type": "null"}}}


def _texts(*fields: str) -> Schema:
    """Return the schema of an object that has each of the fields, with a value."""
    return {"required": [*fields], "properties": {name: {"not": {"type": "null"}} for name in fields}}


def _item(kind: str, *fields: str) -> Schema:
    """Return the schema of an item of /v1/responses with these fields."""
    return {"allOf": [_with(type=kind), _texts(*fields)]}


def _several(prompt: Schema) -> Schema:
    return {"type": "array", "items": prompt, "minItems": 1, "maxItems": MAX_PROMPTS}


_TEXT: Schema = {"type": "string", "minLength": 1}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_OPENS_OR_CONTINUES = {"not": _with(add_generation_prompt=True, continue_final_message=True)}
_OF_STREAMS = [
    {"anyOf": [_without("stream_options"), _with(stream=True)]},
    {"anyOf": [_without("prompt_logprobs"), {"not": _with(stream=True)}]},
]
_ITEM_ROLES = ["user", "assistant", "system", "developer"]
_ITEM_TEXTS = {"items": {"properties": {"type": {"enum": ["input_text", "output_text", "text", "refusal"]}}}}
_HAS_LOGPROBS = {"required": ["include"], "properties": {"include": {"contains": {"const": LOGPROBS}}}}
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
    **ANTHROPIC_RULES,
    "CompletionRequest": [
        *_OF_STREAMS,
        {"properties": {"prompt": {"anyOf": [_TEXT, _TOKENS, _several(_TEXT), _several(_TOKENS)]}}},
        {"anyOf": [{"properties": {"max_tokens": {"not": {"const": 0}}}}, _with(echo=True)]},
    ],
    "ResponseInputPart": [{"anyOf": [_texts("text"), {"allOf": [_with(type="refusal"), _texts("refusal")]}]}],
    "ResponseInputItem": [
        {
            "anyOf": [
                {
                    "required": ["role", "content"],
                    "properties": {
                        "type": {"enum": ["message", None]},
                        "role": {"enum": _ITEM_ROLES},
                        "content": {"not": {"type": "null"}} | _ITEM_TEXTS,
                    },
                },
                _item("function_call", "call_id", "name", "arguments"),
                _item("function_call_output", "call_id", "output"),
                _item("reasoning"),
                _item("item_reference", "id"),
                {"not": {"required": ["content"]}, "allOf": [_texts("id"), _without("type")]},
            ]
        }
    ],
    "ResponsesRequest": [
        {"anyOf": [_without("stream_options"), _with(stream=True)]},
        {"not": _with(background=True, store=False)},
        {"anyOf": [{"properties": {"top_logprobs": {"enum": [0, None]}}}, _HAS_LOGPROBS]},
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
    **ANTHROPIC_EXAMPLES,
    "ResponsesRequest": {
        "A question": {"input": "What is the capital of France?", "max_output_tokens": 64},
        "A conversation": {
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": "Name a prime number."},
                {"role": "assistant", "content": "Seven."},
                {"role": "user", "content": [{"type": "input_text", "text": "And the next one?"}]},
            ],
            "max_output_tokens": 64,
            "store": False,
        },
        "A stream": {"input": "Write a haiku about the sea.", "max_output_tokens": 64, "stream": True},
    },
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
