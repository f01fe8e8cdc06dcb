"""From what a client sends to `SamplingParams`, or to an error that names the field, its value and the limit."""

from collections.abc import Mapping
from typing import Any

from dispec.engine.errors import InvalidField
from dispec.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from dispec.serving.api.protocol import ChatRequest, CompletionRequest
from dispec.serving.api.request_decoding import shown
from dispec.serving.http.errors import ApiError, invalid
from dispec.serving.settings import MAX_CHOICES, MAX_STOPS, MAX_TEMPLATE_ARGUMENTS, MAX_TOKEN_IDS

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's

# What a request may leave to the checkpoint's generation_config.json.
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

_PLAIN = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "logit_bias", "seed", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "ignore_eos",
    "skip_special_tokens", "bad_words", "allowed_token_ids", "n",
)  # fmt: skip


def sampling_params(
    request: ChatRequest | CompletionRequest, defaults: Mapping[str, Any], room: int, max_model_len: int
) -> SamplingParams:
    """`room` is how many tokens fit after the prompt. Raises ApiError."""
    given = {name: value for name in _PLAIN if (value := getattr(request, name)) is not None}
    given = {**defaults, **given}
    given["stop"] = stop_strings(request.stop)
    if (n := given.get("n", 1)) > MAX_CHOICES:
        raise invalid("n", f"n is {shown(n)}, must be at most {MAX_CHOICES}")
    for name in ("stop_token_ids", "allowed_token_ids"):
        if (count := len(given.get(name) or ())) > MAX_TOKEN_IDS:
            raise invalid(name, f"{name} holds {count} token ids, must be at most {MAX_TOKEN_IDS}")
    given["max_tokens"] = max_tokens(request, room, max_model_len)
    given["logprobs"] = logprobs(request)
    given["prompt_logprobs"] = request.prompt_logprobs
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        given["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError(400, "prompt_logprobs is not available where stream is true", param="prompt_logprobs")
    try:
        return SamplingParams(**given)
    except InvalidField as error:
        raise invalid(error.field, str(error)) from None
    except (ValueError, OverflowError) as error:
        raise invalid(None, str(error)) from None


def max_tokens(request: ChatRequest | CompletionRequest, room: int, max_model_len: int) -> int:
    """How many tokens to generate at most: as many as fit, in a chat that says nothing about it.

    A prompt and `max_tokens` may be more than the context together; the context then ends the answer.
    """
    if isinstance(request, ChatRequest):
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        default = room
    else:
        name, wanted, default = "max_tokens", request.max_tokens, DEFAULT_COMPLETION_TOKENS
        if wanted == 0 and request.echo:  # the prompt alone: a token is computed and thrown away
            return 1
    if wanted is None:
        return max(default, 1, min(request.min_tokens or 0, max_model_len))
    check_max_tokens(name, wanted, max_model_len)
    return wanted


def check_max_tokens(name: str, wanted: int, max_model_len: int) -> None:
    """Raise ApiError for what no prompt leaves room for, in vLLM's words, by which clients know how much to ask for."""
    if wanted < 1:
        raise invalid(name, f"{name} is {shown(wanted)}, must be between 1 and {max_model_len}")
    if wanted > max_model_len:
        raise invalid(name, f"{name}={shown(wanted)} cannot be greater than max_model_len={max_model_len}")


def logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    top = request.top_logprobs
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise invalid("top_logprobs", f"top_logprobs is {shown(top)}, must be between 0 and {MAX_LOGPROBS}")
    if top and not request.logprobs:
        raise invalid("top_logprobs", f"top_logprobs is {top}, must come with logprobs true")
    return (top or 0) if request.logprobs else None


def stop_strings(given: str | list[str] | None) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"stop holds {len(stops)} texts, must be at most {MAX_STOPS}")
    return stops


def template_arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The variables that a client may set in a template: plain values, under names that are none of its own."""
    arguments = dict(given or {})
    if len(arguments) > MAX_TEMPLATE_ARGUMENTS:
        said = f"{_ARGUMENTS} holds {len(arguments)} values, must be at most {MAX_TEMPLATE_ARGUMENTS}"
        raise invalid(_ARGUMENTS, said)
    for name, value in arguments.items():
        if not name.isidentifier() or name.startswith("_") or name in RESERVED_TEMPLATE_NAMES or len(name) > 64:
            raise invalid(_ARGUMENTS, f"{_ARGUMENTS} holds {name!r:.70}, which is no variable that a request may set")
        if value is not None and type(value) not in (str, int, float, bool):
            kind = type(value).__name__
            raise invalid(_ARGUMENTS, f"{_ARGUMENTS}.{name} is a {kind}, must be a text, number or boolean")
    return arguments


_ARGUMENTS = "chat_template_kwargs"
RESERVED_TEMPLATE_NAMES = frozenset({
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens", "raise_exception", "strftime_now", "self", "range", "dict", "lipsum", "cycler",
    "joiner", "namespace", "loop",
})  # fmt: skip
