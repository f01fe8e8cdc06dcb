"""The bodies of /v1/responses. Names and shapes are those of OpenAI's Responses API.

As in `serving.api.protocol`, a null in a request is a field left out, and UNSET fields are left out of the JSON.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from dispec.engine.sampling_params import MAX_LOGPROBS
from dispec.serving.api.protocol import GenerationRequestFields, SpecialTokensInContent, TemplateArguments
from dispec.serving.api.response_bodies import ChatLogprob

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]

LOGPROBS = "message.output_text.logprobs"  # of `include`
INCLUDABLE = frozenset({
    LOGPROBS,
    "reasoning.encrypted_content",  # reasoning is in the items as plain text, which clients can send back
    # Of items that responses of this server do not have.
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "code_interpreter_call.outputs", "computer_call_output.output.image_url", "message.input_image.image_url",
})  # fmt: skip

MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512  # pairs, characters, characters

_INPUT = Meta(
    description="A text, or the items of a conversation.",
    extra_json_schema={
        "minLength": 1,
        "minItems": 1,
        "allOf": [{"items": {"$ref": "#/components/schemas/ResponseInputItem"}}],
    },
)
_TOOLS = Meta(
    description="Functions that the answer may call.",
    extra_json_schema={"allOf": [{"items": {"$ref": "#/components/schemas/ResponseFunctionTool"}}]},
)
_METADATA = Meta(
    extra_json_schema={
        "maxProperties": MAX_METADATA,
        "propertyNames": {"maxLength": MAX_METADATA_KEY},
        "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE},
    }
)
_LOGPROB_COUNT = Meta(
    description=f"Likeliest tokens at each place; needs `{LOGPROBS}` in `include`.",
    extra_json_schema={"minimum": 0, "maximum": MAX_LOGPROBS},
)


class TextFormat(Struct, kw_only=True):
    """The form of the answer's text."""

    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(Struct, kw_only=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(Struct, kw_only=True):
    """effort: for chat templates that know it. The others are accepted where they ask for nothing."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class ResponseStreamOptions(Struct, kw_only=True):
    include_obfuscation: bool | None = None


class PromptCacheOptions(Struct, kw_only=True):
    prewarm: bool | None = None


class ResponsesRequest(GenerationRequestFields, kw_only=True):
    input: Annotated[str | list[dict[str, Any]], _INPUT]
    instructions: Annotated[str | None, Meta(description="A system message before the input, for this response.")] = (
        None
    )
    max_output_tokens: Annotated[int | None, Meta(extra_json_schema={"minimum": 1})] = None
    max_tool_calls: Annotated[
        int | None,
        Meta(description="Of hosted tools, which this server does not run.", extra_json_schema={"minimum": 1}),
    ] = None
    tools: Annotated[list[dict[str, Any]] | None, _TOOLS] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None, Meta(description="auto, none, required, a function, or allowed_tools.")
    ] = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[str] | None, Meta(extra_json_schema={"items": {"enum": sorted(INCLUDABLE)}})] = None
    top_logprobs: Annotated[int | None, _LOGPROB_COUNT] = None
    previous_response_id: Annotated[
        str | None, Meta(description="The stored response whose conversation this input continues.")
    ] = None
    store: Annotated[bool | None, Meta(description="False keeps nothing of the response; the default is true.")] = None
    background: Annotated[
        bool | None, Meta(description="Answer at once, and go on without the client. Needs `store`.")
    ] = None
    truncation: Annotated[
        str | None,
        Meta(
            description="auto drops the oldest turns of a conversation that is too long.",
            extra_json_schema={"enum": ["auto", "disabled", None]},
        ),
    ] = None
    stream_options: ResponseStreamOptions | None = None
    metadata: Annotated[dict[str, str] | None, _METADATA] = None
    service_tier: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    chat_template_kwargs: TemplateArguments = None
    allow_special_tokens_in_content: SpecialTokensInContent = None


# Responses


class OutputText(Struct, tag_field="type", tag="output_text"):
    """annotations: empty, because the model cites nothing."""

    text: str
    annotations: list[Any] = field(default_factory=list)
    logprobs: list[ChatLogprob] = field(default_factory=list)


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    text: str


class MessageItem(Struct, tag_field="type", tag="message", kw_only=True):
    id: str
    content: list[OutputText]
    status: ItemStatus
    role: Literal["assistant"] = "assistant"


class ReasoningItem(Struct, tag_field="type", tag="reasoning", kw_only=True):
    """summary: empty, because the reasoning itself is in `content`."""

    id: str
    content: list[ReasoningText]
    status: ItemStatus
    summary: list[Any] = field(default_factory=list)
    encrypted_content: str | None = None


class FunctionCallItem(Struct, tag_field="type", tag="function_call", kw_only=True):
    """arguments: JSON text."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


class InputTokensDetails(Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Struct):
    reason: Literal["max_output_tokens"]


class ResponseError(Struct):
    code: str
    message: str


class Response(Struct, kw_only=True):
    """An answer. The fields from `instructions` on repeat the request, with the defaults that were used."""

    id: str
    created_at: int
    model: str
    status: Status
    background: bool
    store: bool
    object: Literal["response"] = "response"
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    output: list[OutputItem] = field(default_factory=list)
    usage: ResponseUsage | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, str | None] = field(default_factory=dict)
    safety_identifier: str | None = None
    service_tier: str | None = None
    temperature: float | None = None
    text: dict[str, Any] = field(default_factory=dict)
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = field(default_factory=list)
    top_logprobs: int = 0
    top_p: float | None = None
    truncation: str = "disabled"
    user: str | None = None
    kv_transfer_params: dict[str, Any] | UnsetType = UNSET


class InputItemList(Struct):
    """A page of the items that a response answers."""

    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class DeletedResponse(Struct):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True
