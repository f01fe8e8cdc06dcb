"""The bodies of requests and responses of Anthropic's API.

A null in a request is a field left out. Fields of a request that are refused or ignored by name are in
`serving.api.request_fields`. Fields of blocks and tools that are not here (`cache_control`, `citations`, …)
cannot change the response.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from dispec.engine.sampling_params import MAX_STOP_LENGTH
from dispec.serving.api.protocol import GenerationRequestFields, SpecialTokensInContent, TemplateArguments
from dispec.serving.settings import MAX_STOPS

_STOP_SEQUENCES = Meta(
    extra_json_schema={
        "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
        "maxItems": MAX_STOPS,
    }
)


def _one_of(*values: str | None) -> Meta:
    """Return the values of a text for the OpenAPI document; msgspec does not check them."""
    return Meta(extra_json_schema={"enum": [*values]})


_MAX_TOKENS = Meta(extra_json_schema={"minimum": 1}, description="The most tokens to generate.")


class RequestBlock(Struct, kw_only=True):
    """A block of a message: text, tool_use, tool_result, thinking or redacted_thinking, each with its own fields."""

    type: Annotated[str, _one_of("text", "tool_use", "tool_result", "thinking", "redacted_thinking")]
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[RequestBlock] | None" = None
    is_error: bool | None = None
    thinking: str | None = None


class RequestTurn(Struct):
    """A message of user, assistant or system. Claude Code writes ctx and msg as well, which are user."""

    role: Annotated[str, _one_of("user", "assistant", "system", "ctx", "msg")]
    content: str | list[RequestBlock]


class RequestTool(Struct, kw_only=True):
    """A tool that the client runs."""

    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    type: Annotated[str | None, _one_of("custom", None)] = None
    input_examples: list[dict[str, Any]] | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None


class RequestToolChoice(Struct, kw_only=True):
    """Whether the answer calls tools: `tool` has the name of one."""

    type: Annotated[str, _one_of("auto", "any", "tool", "none")]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class RequestThinking(Struct, kw_only=True):
    """The model's reasoning, for chat templates that can turn it off. omitted: it is left out of the answer."""

    type: Annotated[str, _one_of("enabled", "adaptive", "disabled")]
    budget_tokens: Annotated[int | None, Meta(extra_json_schema={"minimum": 0})] = None
    display: Annotated[str | None, _one_of("summarized", "omitted", None)] = None


class RequestOutputFormat(Struct, kw_only=True):
    """The JSON Schema that the answer follows."""

    type: Annotated[str, _one_of("json_schema")]
    schema: dict[str, Any]


class RequestOutputConfig(Struct, kw_only=True):
    """effort: for chat templates that know it; high is the default, and so accepted by all."""

    effort: Annotated[str | None, _one_of("low", "medium", "high", "xhigh", "max", None)] = None
    format: RequestOutputFormat | None = None
    task_budget: Any = None


class CountTokensRequest(GenerationRequestFields, kw_only=True):
    """A request whose prompt is counted. Fields that do not change the prompt are accepted."""

    messages: Annotated[list[RequestTurn], Meta(extra_json_schema={"minItems": 1})]
    system: str | list[RequestBlock] | None = None
    tools: list[RequestTool] | None = None
    tool_choice: RequestToolChoice | None = None
    thinking: RequestThinking | None = None
    output_config: RequestOutputConfig | None = None
    output_format: RequestOutputFormat | None = None
    chat_template_kwargs: TemplateArguments = None
    allow_special_tokens_in_content: SpecialTokensInContent = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    max_tokens: Annotated[int, _MAX_TOKENS]
    stop_sequences: Annotated[list[str] | None, _STOP_SEQUENCES] = None


# Responses


class ThinkingBlock(Struct, tag_field="type", tag="thinking"):
    """The model's reasoning. The signature is empty: blocks that come back are not verified."""

    thinking: str
    signature: str = ""


class TextBlock(Struct, tag_field="type", tag="text"):
    text: str


class ToolUseBlock(Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


Block = ThinkingBlock | TextBlock | ToolUseBlock


class OutputTokensDetails(Struct):
    thinking_tokens: int


class MessageUsage(Struct):
    """input_tokens: those of the prompt that were computed, without those read from the cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0
    output_tokens_details: OutputTokensDetails | UnsetType = UNSET


class Message(Struct, tag_field="type", tag="message"):
    id: str
    model: str
    content: list[Block]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage
    role: Literal["assistant"] = "assistant"
    kv_transfer_params: dict[str, Any] | UnsetType = UNSET


class TokensCount(Struct):
    input_tokens: int


# Events of streams, whose name is their type


class TextDelta(Struct, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(Struct, tag_field="type", tag="thinking_delta"):
    thinking: str


class SignatureDelta(Struct, tag_field="type", tag="signature_delta"):
    signature: str = ""


class InputJsonDelta(Struct, tag_field="type", tag="input_json_delta"):
    partial_json: str


class StopDelta(Struct):
    stop_reason: str
    stop_sequence: str | None


class MessageStart(Struct, tag_field="type", tag="message_start"):
    message: Message


class ContentBlockStart(Struct, tag_field="type", tag="content_block_start"):
    index: int
    content_block: Block


class ContentBlockDelta(Struct, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class ContentBlockStop(Struct, tag_field="type", tag="content_block_stop"):
    index: int


class MessageDelta(Struct, tag_field="type", tag="message_delta"):
    delta: StopDelta
    usage: MessageUsage


class MessageStop(Struct, tag_field="type", tag="message_stop"):
    pass


class Ping(Struct, tag_field="type", tag="ping"):
    pass


StreamEvent = (
    MessageStart | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDelta | MessageStop | Ping
)
