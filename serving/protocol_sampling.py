"""From what a client sends to `SamplingParams`, or to an error that names the field, its value and the limit."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from engine.sampling_params import MAX_LOGPROBS, SamplingParams
from serving.errors import ApiError, invalid
from serving.protocol import ChatRequest, CompletionRequest, Sampling
from serving.settings import MAX_CHOICES, MAX_STOPS, MAX_TEMPLATE_ARGUMENTS
from serving.whole_numbers import decode

T = TypeVar("T")

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's

# What a request may leave to the checkpoint's generation_config.json.
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

_PLAIN = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "logit_bias", "seed", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "ignore_eos",
    "skip_special_tokens", "bad_words", "allowed_token_ids", "n",
)  # fmt: skip

# Fields that are refused, and the values, null apart, that ask for nothing and so do no harm.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "documents": ([],),
    "chat_template": (),
}
UNSUPPORTED_FIELDS = frozenset({*_UNSUPPORTED, "best_of"})

_KINDS = {
    "float": "a number",
    "int": "an integer",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_VALIDATION = re.compile(r"(?P<what>.*?)(?: - at `(?P<key>key` in `)?\$(?P<path>.*)`)?", re.DOTALL)
_EXPECTED = re.compile(r"Expected `([^`]+)`")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")


def decode_body(body: bytes, form: type[T]) -> T:
    """The body as a struct. Raises ApiError with status 400."""
    try:
        return decode(body, form)
    except msgspec.ValidationError as error:
        raise invalid(_explain(str(error), body)) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except (msgspec.DecodeError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        said = "the body is empty" if not body else f"the body is not JSON: {error}"
        raise ApiError(400, said, code="invalid_json") from None


def refuse_unsupported(request: Sampling) -> None:
    """Raises ApiError for the first field that asks for something that does not exist here."""
    for name, harmless in _UNSUPPORTED.items():
        value = getattr(request, name, None)
        if value is not None and not any(type(value) is type(known) and value == known for known in harmless):
            raise ApiError(400, f"{name} is not supported yet: leave it out", param=name, code="not_supported")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise ApiError(400, "best_of is not supported yet: leave it out", param="best_of", code="not_supported")
    if isinstance(request, ChatRequest) and request.echo not in (None, False):
        raise ApiError(400, "echo is not supported in chat completions", param="echo", code="not_supported")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only for requests with stream true", param="stream_options")


def sampling_params(request: ChatRequest | CompletionRequest, defaults: Mapping[str, Any], room: int) -> SamplingParams:
    """`room` is how many tokens fit after the prompt. Raises ApiError."""
    given = {name: value for name in _PLAIN if (value := getattr(request, name)) is not None}
    given = {**defaults, **given}
    given["stop"] = stop_strings(request.stop)
    if (n := given.get("n", 1)) > MAX_CHOICES:
        raise invalid(f"n is {_shown(n)}, must be at most {MAX_CHOICES}")
    given["max_tokens"] = max_tokens(request, room)
    given["logprobs"] = logprobs(request)
    given["prompt_logprobs"] = request.prompt_logprobs
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        given["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError(400, "prompt_logprobs is not available where stream is true", param="prompt_logprobs")
    try:
        return SamplingParams(**given)
    except (ValueError, OverflowError) as error:
        raise invalid(str(error)) from None


def max_tokens(request: ChatRequest | CompletionRequest, room: int) -> int:
    """How many tokens to generate at most: as many as fit, in a chat that says nothing about it."""
    if isinstance(request, ChatRequest):
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        default = room
    else:
        name, wanted, default = "max_tokens", request.max_tokens, DEFAULT_COMPLETION_TOKENS
        if wanted == 0 and request.echo:  # the prompt alone: a token is computed and thrown away
            return 1
    if wanted is None:
        return max(default, 1, request.min_tokens or 0)
    if not 1 <= wanted < 2**31:
        raise invalid(f"{name} is {_shown(wanted)}, must be between 1 and {2**31 - 1}")
    return wanted


def logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    top = request.top_logprobs
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise invalid(f"top_logprobs is {_shown(top)}, must be between 0 and {MAX_LOGPROBS}")
    if top and not request.logprobs:
        raise invalid(f"top_logprobs is {top}, must come with logprobs true")
    return (top or 0) if request.logprobs else None


def stop_strings(given: str | list[str] | None) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if len(stops) > MAX_STOPS:
        raise invalid(f"stop holds {len(stops)} texts, must be at most {MAX_STOPS}")
    return stops


def template_arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The variables that a client may set in a template: plain values, under names that are none of its own."""
    arguments = dict(given or {})
    if len(arguments) > MAX_TEMPLATE_ARGUMENTS:
        raise invalid(f"chat_template_kwargs holds {len(arguments)} values, must be at most {MAX_TEMPLATE_ARGUMENTS}")
    for name, value in arguments.items():
        if not name.isidentifier() or name.startswith("_") or name in _TEMPLATE_OWN or len(name) > 64:
            raise invalid(f"chat_template_kwargs holds {name!r:.70}, which is no variable that a request may set")
        if value is not None and type(value) not in (str, int, float, bool):
            raise invalid(f"chat_template_kwargs.{name} is a {type(value).__name__}, must be a text, number or boolean")
    return arguments


_TEMPLATE_OWN = frozenset({
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens", "raise_exception", "strftime_now", "self", "range", "dict", "lipsum", "cycler",
    "joiner", "namespace", "loop",
})  # fmt: skip


def _shown(value: Any) -> str:
    try:
        text = str(value) if type(value) is int else msgspec.json.encode(value).decode()
    except (OverflowError, ValueError, RecursionError, msgspec.MsgspecError):
        return "too large"
    return text if len(text) <= 60 else f"{text[:60]}…"


def _explain(said: str, body: bytes) -> str:
    """msgspec's words as ours: the field, its value, and what it must be."""
    found = _VALIDATION.fullmatch(said)
    assert found is not None
    what, path = found["what"], (found["path"] or "").removeprefix(".")
    if "missing required field" in what:
        name = what.rsplit("`", 2)[-2]
        return f"{f'{path}.' if path else ''}{name} is missing"
    expected = _EXPECTED.match(what)
    if expected is None:  # "Number out of range"
        return f"{path or 'the body'} is not valid: {what[:1].lower()}{what[1:]}"
    kinds = [_KINDS.get(kind.strip(), kind.strip()) for kind in expected[1].split("|")]
    must_be = " or ".join(kind for kind in kinds if kind != "null" or len(kinds) == 1)
    if found["key"]:
        return f"{path} has a key that is not {must_be}"
    try:
        value = _shown(_value_at(body, path))
    except (RecursionError, ValueError, LookupError):  # what comes after the first mistake may be worse
        return f"{path or 'the body'} must be {must_be}"
    return f"{path or 'the body'} is {value}, must be {must_be}"


def _value_at(body: bytes, path: str) -> Any:
    value = msgspec.json.decode(body)
    for name, index in _STEP.findall(f".{path}" if path else ""):
        if index == "...":
            return value
        value = value[name] if name else value[int(index)]
    return value
