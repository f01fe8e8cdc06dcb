"""The bodies of requests.

A null in a request is a field left out. Fields that are refused or ignored by name are in `serving.api.request_fields`.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct

from dispec.engine.option_fields import option_fields
from dispec.engine.request_checks import MAX_PRIORITY, MIN_PRIORITY
from dispec.engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_LENGTH, SamplingParams
from dispec.serving.http.middleware import MAX_REQUEST_ID
from dispec.serving.settings import MAX_BAD_WORDS, MAX_STOPS, MAX_TEMPLATE_ARGUMENTS

PromptInput = str | list[str | int | list[int]]

MAX_ARGUMENT_NAME = 64  # characters


def _limits(
    ge: float | None = None, le: float | None = None, description: str = "", *, gt: float | None = None
) -> Meta:
    """Return the limits of a number for the OpenAPI document; msgspec does not check them."""
    limits = {"minimum": ge, "exclusiveMinimum": gt, "maximum": le}
    schema = {name: value for name, value in limits.items() if value is not None}
    return Meta(extra_json_schema=schema, description=description or None)


def _param(name: str) -> Meta:
    """Return the help and the limits that `SamplingParams` declares for a field."""
    option = option_fields(SamplingParams)[name].option
    return _limits(option.ge, option.le, option.help, gt=option.gt)


def _shape(description: str = "", **schema: Any) -> Meta:
    """Return a schema for other values than numbers. A keyword has no effect on values of other types."""
    return Meta(extra_json_schema=schema, description=description or None)


_TOKENS = _shape(items={"type": "integer", "minimum": 0})
_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_STOP = _shape(minLength=1, maxLength=MAX_STOP_LENGTH, items=_TEXT, maxItems=MAX_STOPS)
_BIASES = _shape(
    propertyNames={"pattern": "^(0|[1-9][0-9]{0,8})$"},
    additionalProperties={"minimum": -100, "maximum": 100},
    maxProperties=MAX_LOGIT_BIAS,
)
_REQUEST_ID = _shape(pattern="^[!-~]*$", maxLength=MAX_REQUEST_ID)
_NUM_KEPT = _shape("Keep so many; -1: what fits.", minimum=-1, **{"not": {"const": 0}})
_SIDE = _shape("The side that is cut off; left if left out.", enum=["left", "right"])
_AS_IDS = _shape("Write tokens of log-probabilities as `token_id:` and the id.")
_PLAIN = _shape(
    "Read special tokens that messages spell out as those tokens, and not as text. The server's default:"
    " --allow-special-tokens-in-content."
)
_PRIORITY = _limits(MIN_PRIORITY, MAX_PRIORITY, "Lower goes first.")
# In `allOf`, because msgspec writes an "items" of its own. `serving.api.openapi_schemas` has the message.
_MESSAGES = _shape(minItems=1, allOf=[{"items": {"$ref": "#/components/schemas/RequestMessage"}}])
_ARGUMENTS = _shape(
    maxProperties=MAX_TEMPLATE_ARGUMENTS,
    propertyNames={"pattern": f"^[A-Za-z][A-Za-z0-9_]{{0,{MAX_ARGUMENT_NAME - 1}}}$"},
    additionalProperties={"type": ["string", "number", "boolean", "null"]},
)
TemplateArguments = Annotated[dict[str, Any] | None, _ARGUMENTS]
SpecialTokensInContent = Annotated[bool | None, _PLAIN]


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequestFields(Struct, kw_only=True):
    """The fields that all routes of generation share."""

    model: str | None = None
    temperature: Annotated[float | None, _param("temperature")] = None
    top_p: Annotated[float | None, _param("top_p")] = None
    top_k: Annotated[int | None, _param("top_k")] = None
    min_p: Annotated[float | None, _param("min_p")] = None
    frequency_penalty: Annotated[float | None, _param("frequency_penalty")] = None
    presence_penalty: Annotated[float | None, _param("presence_penalty")] = None
    repetition_penalty: Annotated[float | None, _param("repetition_penalty")] = None
    logit_bias: Annotated[dict[int, float] | None, _BIASES] = None
    seed: Annotated[int | None, _param("seed")] = None
    stop: Annotated[str | list[str] | None, _STOP] = None
    stop_token_ids: Annotated[list[int] | None, _TOKENS] = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int | None, _param("min_tokens")] = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: Annotated[list[str] | None, _shape(items=_TEXT, maxItems=MAX_BAD_WORDS)] = None
    allowed_token_ids: Annotated[list[int] | None, _TOKENS, _shape(minItems=1)] = None
    stream: bool | None = None
    priority: Annotated[int | None, _PRIORITY] = None
    slo: Annotated[str | None, _shape("The class of latency objectives that the request belongs to.")] = None
    request_id: Annotated[str | None, _REQUEST_ID] = None
    cache_salt: str | None = None
    kv_transfer_params: Annotated[Any, _shape("With which routers split a request between workers.")] = None
    structured_outputs: Annotated[dict[str, Any] | None, _shape("The structure of the output, in vLLM's form.")] = None


class SamplingRequest(GenerationRequestFields, kw_only=True):
    """The fields that chat and plain completions share."""

    max_tokens: Annotated[int | None, _param("max_tokens")] = None
    n: Annotated[int | None, _param("n")] = None
    prompt_logprobs: Annotated[int | None, _param("prompt_logprobs")] = None
    truncate_prompt_tokens: Annotated[int | None, _NUM_KEPT] = None
    truncation_side: Annotated[str | None, _SIDE] = None
    add_special_tokens: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: Annotated[bool | None, _AS_IDS] = None
    response_format: Annotated[dict[str, Any] | None, _shape("The structure of the answer, in OpenAI's form.")] = None
    guided_json: Annotated[str | dict[str, Any] | None, _shape("An older name of structured_outputs.json.")] = None
    guided_regex: Annotated[str | None, _shape("An older name of structured_outputs.regex.")] = None
    guided_choice: Annotated[list[str] | None, _shape("An older name of structured_outputs.choice.")] = None
    guided_grammar: Annotated[str | None, _shape("An older name of structured_outputs.grammar.")] = None
    guided_json_object: Annotated[bool | None, _shape("An older name of structured_outputs.json_object.")] = None
    structural_tag: Annotated[
        str | dict[str, Any] | None, _shape("An older name of structured_outputs.structural_tag.")
    ] = None


class ChatRequest(SamplingRequest, kw_only=True):
    messages: Annotated[list[dict[str, Any]], _MESSAGES]
    max_completion_tokens: Annotated[int | None, _param("max_tokens")] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, _limits(0, MAX_LOGPROBS)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateArguments = None
    allow_special_tokens_in_content: SpecialTokensInContent = None
    tools: Annotated[list[dict[str, Any]] | None, _shape("Functions that the answer may call.")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None, _shape("auto, none, required, or the function to call. Without tools: none.")
    ] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str | None, _shape("For chat templates that know it; none: no reasoning.")] = None
    thinking_token_budget: Annotated[
        int | None, _limits(-1, description="Most tokens of reasoning, whose end then follows; -1: no limit.")
    ] = None
    include_reasoning: Annotated[bool | None, _shape("False leaves the reasoning out of the answer.")] = None


class CompletionRequest(SamplingRequest, kw_only=True):
    prompt: Annotated[PromptInput, _shape(minItems=1, minLength=1)]
    max_tokens: Annotated[int | None, _limits(0, 2**31 - 1, "0 only with echo.")] = None
    logprobs: Annotated[int | None, _param("logprobs")] = None
    echo: bool | None = None


class GenerateRequest(Struct, kw_only=True):
    """A completion in short form."""

    model: str | None = None
    prompt: Annotated[str | list[int], _shape(minItems=1, minLength=1)]
    max_new_tokens: Annotated[int | None, _param("max_tokens")] = None
    temperature: Annotated[float | None, _param("temperature")] = None
    priority: Annotated[int | None, _PRIORITY] = None


class TokenizeRequest(Struct, kw_only=True):
    """A text, or messages and tools for the model's chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]] | None, _MESSAGES] = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateArguments = None
    allow_special_tokens_in_content: SpecialTokensInContent = None
    tools: Annotated[list[dict[str, Any]] | None, _shape("As of chat completions; only with messages.")] = None


class DetokenizeRequest(Struct, kw_only=True):
    model: str | None = None
    tokens: list[Annotated[int, _limits(0)]]
