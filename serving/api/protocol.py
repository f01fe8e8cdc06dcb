"""What clients send: the bodies of requests, with the fields that are honoured. Nulls stand for what is left out.

Other fields that clients know are in `serving.api.request_fields`, refused or ignored by name.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct

PromptInput = str | list[str | int | list[int]]


def _limits(low: float | None = None, high: float | None = None, description: str = "") -> Meta:
    """For the OpenAPI document only: `SamplingParams` checks them, and says more than msgspec would."""
    limits = {name: value for name, value in (("minimum", low), ("maximum", high)) if value is not None}
    return Meta(extra_json_schema=limits, description=description or None)


def _above(low: float, high: float, description: str = "") -> Meta:
    """The same for a number that must be more than the lower limit."""
    limits = {"exclusiveMinimum": low, "maximum": high}
    return Meta(extra_json_schema=limits, description=description or None)


def _shape(**schema: Any) -> Meta:
    """The same for what is not a number. Keywords say nothing about values of types that they do not know."""
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
_CUT = Meta(extra_json_schema={"minimum": -1, "not": {"const": 0}}, description="Keep so many; -1: what fits.")
_SIDE = Meta(extra_json_schema={"enum": ["left", "right"]}, description="The side that is cut off; left if left out.")
_AS_IDS = Meta(description="Write tokens of log-probabilities as `token_id:` and the id.")
_PLAIN = Meta(
    description="Read special tokens that messages spell out as those tokens, and not as text. The server's default:"
    " --allow-special-tokens-in-content."
)
_MESSAGES = _shape(
    minItems=1,
    allOf=[
        {"items": {"$ref": "#/components/schemas/RequestMessage"}}
    ],  # msgspec has "items"; `serving.api.openapi_bodies`
)
_ARGUMENTS = _shape(
    maxProperties=32,
    propertyNames={"pattern": "^[A-Za-z][A-Za-z0-9_]{0,63}$"},
    additionalProperties={"type": ["string", "number", "boolean", "null"]},
)


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Struct, kw_only=True):
    """What chat and plain completions have in common."""

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
    truncate_prompt_tokens: Annotated[int | None, _CUT] = None
    truncation_side: Annotated[str | None, _SIDE] = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int | None, _limits(-(2**31), 2**31 - 1, "Lower goes first.")] = None
    slo: Annotated[str | None, Meta(description="The class whose objectives it is to be held to.")] = None
    request_id: Annotated[str | None, _NAME] = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: Annotated[bool | None, _AS_IDS] = None
    kv_transfer_params: Annotated[Any, Meta(description="By which routers split a request between workers.")] = None


class ChatRequest(Sampling, kw_only=True):
    messages: Annotated[list[dict[str, Any]], _MESSAGES]
    max_completion_tokens: Annotated[int | None, _limits(1, 2**31 - 1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, _limits(0, 20)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, _ARGUMENTS] = None
    allow_special_tokens_in_content: Annotated[bool | None, _PLAIN] = None


class CompletionRequest(Sampling, kw_only=True):
    prompt: Annotated[PromptInput, _shape(minItems=1, minLength=1)]
    max_tokens: Annotated[int | None, _limits(0, 2**31 - 1, "0 only with echo.")] = None
    logprobs: Annotated[int | None, _limits(0, 20)] = None
    echo: bool | None = None


class GenerateRequest(Struct, kw_only=True):
    """The short form, without roles."""

    model: str | None = None
    prompt: Annotated[str | list[int], _shape(minItems=1, minLength=1)]
    max_new_tokens: Annotated[int | None, _limits(1, 2**31 - 1)] = None
    temperature: Annotated[float | None, _limits(0, 100)] = None
    priority: Annotated[int | None, _limits(-(2**31), 2**31 - 1)] = None


class TokenizeRequest(Struct, kw_only=True):
    """A text, or messages in the model's chat template."""

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
