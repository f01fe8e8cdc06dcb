"""The bodies of requests and responses.

A null in a request is a field left out. Fields that are refused or ignored by name are in `serving.api.request_fields`.
Fields of responses that are UNSET are left out of the JSON.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

PromptInput = str | list[str | int | list[int]]


def _limits(low: float | None = None, high: float | None = None, description: str = "") -> Meta:
    """Describe limits in the OpenAPI document; `SamplingParams` checks them."""
    limits = {name: value for name, value in (("minimum", low), ("maximum", high)) if value is not None}
    return Meta(extra_json_schema=limits, description=description or None)


def _above(low: float, high: float, description: str = "") -> Meta:
    """Describe limits of which the lower one is excluded."""
    limits = {"exclusiveMinimum": low, "maximum": high}
    return Meta(extra_json_schema=limits, description=description or None)


def _shape(**schema: Any) -> Meta:
    """Describe values that are no numbers. A keyword of JSON Schema has no effect on values of other types."""
    return Meta(extra_json_schema=schema)


_TOKENS = _shape(items={"type": "integer", "minimum": 0})
_TEXT = {"type": "string", "minLength": 1, "maxLength": 1024}
_STOP = _shape(minLength=1, maxLength=1024, items=_TEXT, maxItems=4)
_BIASES = _shape(
    propertyNames={"pattern": "^(0|[1-9][0-9]{0,8})$"},
    additionalProperties={"minimum": -100, "maximum": 100},
    maxProperties=1024,
)
_NAME = _shape(pattern="^[!-~]*$", maxLength=128)
_NUM_KEPT = Meta(extra_json_schema={"minimum": -1, "not": {"const": 0}}, description="Keep so many; -1: what fits.")
_SIDE = Meta(extra_json_schema={"enum": ["left", "right"]}, description="The side that is cut off; left if left out.")
_AS_IDS = Meta(description="Write tokens of log-probabilities as `token_id:` and the id.")
_PLAIN = Meta(
    description="Read special tokens that messages spell out as those tokens, and not as text. The server's default:"
    " --allow-special-tokens-in-content."
)
# In `allOf`, because msgspec writes an "items" of its own. `serving.api.openapi_schemas` has the message.
_MESSAGES = _shape(minItems=1, allOf=[{"items": {"$ref": "#/components/schemas/RequestMessage"}}])
_ARGUMENTS = _shape(
    maxProperties=32,
    propertyNames={"pattern": "^[A-Za-z][A-Za-z0-9_]{0,63}$"},
    additionalProperties={"type": ["string", "number", "boolean", "null"]},
)


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(Struct, kw_only=True):
    """The fields that chat and plain completions share."""

    model: str | None = None
    max_tokens: Annotated[int | None, _limits(1, 2**31 - 1)] = None
    n: Annotated[int | None, _limits(1, 128)] = None
    temperature: Annotated[float | None, _limits(0, 100)] = None
    top_p: Annotated[float | None, _above(0, 1)] = None
    top_k: Annotated[int | None, _limits(-1, 2**31 - 1, "0 and -1 are off.")] = None
    min_p: Annotated[float | None, _limits(0, 1)] = None
    frequency_penalty: Annotated[float | None, _limits(-2, 2)] = None
    presence_penalty: Annotated[float | None, _limits(-2, 2)] = None
    repetition_penalty: Annotated[float | None, _above(0, 100, "1 is off.")] = None
    logit_bias: Annotated[dict[int, float] | None, _BIASES] = None
    seed: Annotated[int | None, _limits(-(2**63), 2**63 - 1)] = None
    stop: Annotated[str | list[str] | None, _STOP] = None
    stop_token_ids: Annotated[list[int] | None, _TOKENS] = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int | None, _limits(0, 2**31 - 1, "At most max_tokens.")] = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: Annotated[list[str] | None, _shape(items=_TEXT, maxItems=1024)] = None
    allowed_token_ids: Annotated[list[int] | None, _TOKENS, _shape(minItems=1)] = None
    prompt_logprobs: Annotated[int | None, _limits(0, 20)] = None
    truncate_prompt_tokens: Annotated[int | None, _NUM_KEPT] = None
    truncation_side: Annotated[str | None, _SIDE] = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int | None, _limits(-(2**31), 2**31 - 1, "Lower goes first.")] = None
    slo: Annotated[str | None, Meta(description="The class of latency objectives that the request belongs to.")] = None
    request_id: Annotated[str | None, _NAME] = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: Annotated[bool | None, _AS_IDS] = None
    kv_transfer_params: Annotated[Any, Meta(description="By which routers split a request between workers.")] = None


class ChatRequest(SamplingRequest, kw_only=True):
    messages: Annotated[list[dict[str, Any]], _MESSAGES]
    max_completion_tokens: Annotated[int | None, _limits(1, 2**31 - 1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, _limits(0, 20)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, _ARGUMENTS] = None
    allow_special_tokens_in_content: Annotated[bool | None, _PLAIN] = None


class CompletionRequest(SamplingRequest, kw_only=True):
    prompt: Annotated[PromptInput, _shape(minItems=1, minLength=1)]
    max_tokens: Annotated[int | None, _limits(0, 2**31 - 1, "0 only with echo.")] = None
    logprobs: Annotated[int | None, _limits(0, 20)] = None
    echo: bool | None = None


class GenerateRequest(Struct, kw_only=True):
    """A completion in short form."""

    model: str | None = None
    prompt: Annotated[str | list[int], _shape(minItems=1, minLength=1)]
    max_new_tokens: Annotated[int | None, _limits(1, 2**31 - 1)] = None
    temperature: Annotated[float | None, _limits(0, 100)] = None
    priority: Annotated[int | None, _limits(-(2**31), 2**31 - 1)] = None


class TokenizeRequest(Struct, kw_only=True):
    """A text, or messages for the model's chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]] | None, _MESSAGES] = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, _ARGUMENTS] = None
    allow_special_tokens_in_content: Annotated[bool | None, _PLAIN] = None


class DetokenizeRequest(Struct, kw_only=True):
    model: str | None = None
    tokens: list[Annotated[int, _limits(0)]]


# Responses

PromptLogprobs = list[dict[str, dict[str, Any]] | None]


class PromptTokensDetails(Struct):
    cached_tokens: int


class CompletionTokensDetails(Struct):
    """Draft tokens that were accepted and rejected."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(Struct):
    content: str
    role: Literal["assistant"] = "assistant"


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
    kv_transfer_params: dict[str, Any] | UnsetType = UNSET


class Delta(Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Struct):
    """A choice of a response, or its next piece in a chunk, where the finish reason may be missing."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET  # null in a response without, left out of chunks


class Completion(Struct):
    """A response, or a chunk of a stream, where usage comes only if asked for."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET
    kv_transfer_params: dict[str, Any] | UnsetType = UNSET


class Model(Struct):
    id: str
    created: int
    max_model_len: int | None
    root: str
    object: Literal["model"] = "model"
    owned_by: str = "dispec"
    parent: None = None


class ModelList(Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class TokenizeResponse(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Struct):
    prompt: str


class GenerateResponse(Struct):
    text: str
    num_tokens: int
