"""What clients send: the bodies of requests. Unknown fields are ignored, nulls stand for what is left out.

Fields that are known and do nothing here are declared all the same, at the end of each struct, so that
`protocol_sampling.refuse_unsupported` can say so instead of dropping them in silence.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct

PromptInput = str | list[str | int | list[int]]


def _limits(low: float | None = None, high: float | None = None, description: str = "") -> Meta:
    """For the OpenAPI document only: `SamplingParams` checks them, and says more than msgspec would."""
    limits = {name: value for name, value in (("minimum", low), ("maximum", high)) if value is not None}
    return Meta(extra_json_schema=limits, description=description or None)


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Struct, kw_only=True):
    """What chat and plain completions have in common."""

    model: str | None = None
    max_tokens: Annotated[int | None, _limits(0)] = None
    n: Annotated[int | None, _limits(1, 128)] = None
    temperature: Annotated[float | None, _limits(0, 100)] = None
    top_p: Annotated[float | None, _limits(0, 1, "Above 0.")] = None
    top_k: Annotated[int | None, _limits(-1, None, "0 and -1 are off.")] = None
    min_p: Annotated[float | None, _limits(0, 1)] = None
    frequency_penalty: Annotated[float | None, _limits(-2, 2)] = None
    presence_penalty: Annotated[float | None, _limits(-2, 2)] = None
    repetition_penalty: Annotated[float | None, _limits(0, 100, "Above 0; 1 is off.")] = None
    logit_bias: dict[int, float] | None = None
    seed: Annotated[int | None, _limits(-(2**63), 2**63 - 1)] = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int | None, _limits(0)] = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: Annotated[int | None, _limits(0, 20)] = None
    truncate_prompt_tokens: Annotated[int | None, _limits(-1, None, "Keep the last of them; -1: what fits.")] = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int | None, _limits(-(2**31), 2**31 - 1, "Lower goes first.")] = None
    request_id: str | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None

    best_of: Any = None
    echo: Any = None
    suffix: Any = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    use_beam_search: Any = None
    logits_processors: Any = None
    kv_transfer_params: Any = None


class ChatRequest(Sampling, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int | None, _limits(1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, _limits(0, 20)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    documents: Any = None
    chat_template: Any = None


class CompletionRequest(Sampling, kw_only=True):
    prompt: PromptInput | None = None
    logprobs: Annotated[int | None, _limits(0, 20)] = None
    echo: bool | None = None

    prompt_embeds: Any = None


class GenerateRequest(Struct, kw_only=True):
    """The short form, without a model's name or roles."""

    prompt: str | list[int]
    max_new_tokens: Annotated[int | None, _limits(1)] = None
    temperature: Annotated[float | None, _limits(0, 100)] = None
    priority: Annotated[int | None, _limits(-(2**31), 2**31 - 1)] = None


class TokenizeRequest(Struct, kw_only=True):
    """A text, or messages in the model's chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Struct, kw_only=True):
    model: str | None = None
    tokens: list[int]
