"""From the fields of a request to `SamplingParams`. Errors are InvalidField with the field, its value and the limit."""

from collections.abc import Mapping
from typing import Any

from dispec.engine.errors import InvalidField
from dispec.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from dispec.serving.api.protocol import ChatRequest, CompletionRequest
from dispec.serving.api.request_body import format_value
from dispec.serving.api.structure import requested_structure
from dispec.serving.settings import MAX_STOPS, MAX_TOKEN_IDS

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's

_SAME_NAME = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "logit_bias", "seed", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "ignore_eos",
    "skip_special_tokens", "bad_words", "allowed_token_ids", "n", "prompt_logprobs",
)  # fmt: skip


def sampling_params(
    request: ChatRequest | CompletionRequest, defaults: Mapping[str, Any], num_prompt_tokens: int, max_model_len: int
) -> SamplingParams:
    """Return the parameters of a request for prompts of at most `num_prompt_tokens`.

    `defaults` are those of the checkpoint.
    """
    given = {name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None}
    given = {**defaults, **given}
    for name in ("stop_token_ids", "allowed_token_ids"):
        if (count := len(given.get(name) or ())) > MAX_TOKEN_IDS:
            raise InvalidField(name, f"{name} holds {count} token ids, must be at most {MAX_TOKEN_IDS}")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidField("prompt_logprobs", "prompt_logprobs is not available where stream is true")
    given["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(given["stop"]) > MAX_STOPS:
        raise InvalidField("stop", f"stop holds {len(given['stop'])} texts, must be at most {MAX_STOPS}")
    given["max_tokens"] = _max_tokens(request, num_prompt_tokens, max_model_len)
    if isinstance(request, ChatRequest):
        given["logprobs"] = _chat_logprobs(request)
    else:
        given["logprobs"] = request.logprobs
        if request.echo and request.logprobs is not None:
            given["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
    given["structured_outputs"] = requested_structure(request)
    return SamplingParams(**given)


def check_max_tokens(name: str, wanted: int, max_model_len: int) -> None:
    """Raise InvalidField for more tokens than fit, in vLLM's words, which clients parse for the limit."""
    if wanted < 1:
        raise InvalidField(name, f"{name} is {format_value(wanted)}, must be between 1 and {max_model_len}")
    if wanted > max_model_len:
        said = f"{name}={format_value(wanted)} cannot be greater than max_model_len={max_model_len}"
        raise InvalidField(name, said)


def _max_tokens(request: ChatRequest | CompletionRequest, num_prompt_tokens: int, max_model_len: int) -> int:
    """Return the most tokens to generate. A chat that leaves them out gets all that fit.

    Prompt and `max_tokens` may exceed the context together: the end of the context then ends the output.
    """
    name, wanted, default = "max_tokens", request.max_tokens, DEFAULT_COMPLETION_TOKENS
    if isinstance(request, ChatRequest):
        default = max_model_len - num_prompt_tokens
        if request.max_completion_tokens is not None:
            name, wanted = "max_completion_tokens", request.max_completion_tokens
    elif wanted == 0 and request.echo:  # the prompt alone: one token is computed and left out
        return 1
    if wanted is None:
        return max(default, 1, min(request.min_tokens or 0, max_model_len))
    check_max_tokens(name, wanted, max_model_len)
    return wanted


def _chat_logprobs(request: ChatRequest) -> int | None:
    top = request.top_logprobs
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        said = f"top_logprobs is {format_value(top)}, must be between 0 and {MAX_LOGPROBS}"
        raise InvalidField("top_logprobs", said)
    if top and not request.logprobs:
        raise InvalidField("top_logprobs", f"top_logprobs is {top}, must come with logprobs true")
    return (top or 0) if request.logprobs else None
