"""The documented fields of OpenAI's client and of vLLM that each route refuses or ignores.

Fields of the route's struct in `serving.api.protocol` are honoured, those that ask for a missing feature are refused,
and those that cannot change the response are ignored, as are unknown ones. `tests/test_request_fields.py` compares the
lists with the clients'.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from dispec.engine.errors import InvalidField
from dispec.serving.api.anthropic_protocol import CountTokensRequest, MessagesRequest
from dispec.serving.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    SamplingRequest,
    TokenizeRequest,
)
from dispec.serving.api.response_protocol import ResponsesRequest
from dispec.serving.http.errors import ApiError

_NEUTRAL: tuple[Any, ...] = ("", [], {})  # values that ask for nothing, as null does


class RouteFields(NamedTuple):
    """refused: fields, with values that are accepted because they ask for nothing. ignored: fields without effect."""

    refused: dict[str, tuple[Any, ...]]
    ignored: frozenset[str] = frozenset()


# Of chat and plain completions.
_REFUSED: dict[str, tuple[Any, ...]] = dict.fromkeys(
    (
        "guided_decoding_backend", "guided_whitespace_pattern", "regex", "ebnf", "grammar", "json_schema",
        "logits_processors", "logprob_token_ids", "repetition_detection", "ec_transfer_params", "vllm_xargs",
        "lora_path", "suffix", "functions",
    ),
    (),
) | {
    "best_of": (1,),
    "use_beam_search": (False,), "length_penalty": (1,), "early_stopping": (False,), "watermarking": (False,),
    "stream_interval": (1,), "return_token_offsets": (False,),
    "return_prompt_text": (False,), "routed_experts_prompt_start": (0,),
    "function_call": ("none", "auto"),
}  # fmt: skip
_IGNORED = frozenset({
    "user", "session_id",  # of the caller
    "return_mm_kwargs",  # of routes that render prompts
    "spaces_between_special_tokens",  # tokens follow one another without spaces of their own
})  # fmt: skip

_CHAT = RouteFields(
    _REFUSED
    | dict.fromkeys(
        (
            "audio", "prediction", "web_search_options", "moderation", "documents",
            "chat_template", "media_io_kwargs", "mm_processor_kwargs",
        ),
        (),
    )
    | {"echo": (False,), "modalities": (["text"],), "verbosity": ("medium",)},
    _IGNORED
    | {
        "metadata", "store", "service_tier", "safety_identifier",  # for the platform's own records
        "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",  # prompts are always cached
    },
)  # fmt: skip
_COMPLETION = RouteFields(_REFUSED | {"prompt_embeds": (), "thinking_token_budget": (-1,)}, _IGNORED)
_RESPONSES = RouteFields(
    _REFUSED
    | dict.fromkeys(
        (
            "conversation", "prompt", "context_management", "moderation", "access_programs", "media_io_kwargs",
            "mm_processor_kwargs", "previous_input_messages",
            # Of chats, with other names or places here.
            "messages", "max_tokens", "max_completion_tokens", "response_format", "reasoning_effort",
        ),
        (),
    )
    | {
        "background_options": ({"completion_window": "soonest"},), "enable_response_messages": (False,),
        "n": (1,), "logprobs": (False,), "previous_response": (),
    },
    (_IGNORED - {"user"})
    | {
        "image",  # of images, which no input has
        "prompt_cache_retention",  # prompts are always cached
    },
)  # fmt: skip
_TOKENIZE = RouteFields({"chat_template": (), "media_io_kwargs": (), "mm_processor_kwargs": ()})

# Fields of `CompletionRequest` that `GenerateRequest` lacks, with their defaults, which are accepted.
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "model": (), "n": (1,), "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "frequency_penalty": (0,),
    "presence_penalty": (0,), "repetition_penalty": (1,), "include_stop_str_in_output": (False,), "min_tokens": (0,),
    "ignore_eos": (False,), "skip_special_tokens": (True,), "add_special_tokens": (True,), "stream": (False,),
    "return_token_ids": (False,), "return_tokens_as_token_ids": (False,), "echo": (False,),
}  # fmt: skip
_GENERATE = RouteFields(
    _COMPLETION.refused
    | {
        name: _DEFAULTS.get(name, ())
        for name in ("messages", *CompletionRequest.__struct_fields__)
        if name not in GenerateRequest.__struct_fields__
    },
    _IGNORED,
)

_MESSAGES = RouteFields(
    {
        "container": (), "mcp_servers": (), "compaction": (), "thread": (), "fallbacks": (),
        # What Claude Code asks for: to keep all thinking.
        "context_management": ({"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}, {"edits": []}),
    }
    | {
        name: _DEFAULTS.get(name, ())
        for name in ChatRequest.__struct_fields__
        if name not in MessagesRequest.__struct_fields__ and name != "stream_options"
    },
    frozenset({
        "metadata", "service_tier", "speed", "inference_geo", "diagnostics", "user_profile_id", "workspace_id",
        "billing_policy", "fallback_credit_token",  # of the platform
        "cache_control",  # prompts are always cached
        "betas",  # a header, of which the client makes an argument
        "stream_options",  # each stream ends with its usage
    }),
)  # fmt: skip

ROUTES: Mapping[type, RouteFields] = {
    ChatRequest: _CHAT,
    CompletionRequest: _COMPLETION,
    ResponsesRequest: _RESPONSES,
    GenerateRequest: _GENERATE,
    TokenizeRequest: _TOKENIZE,
    MessagesRequest: _MESSAGES,
    CountTokensRequest: _MESSAGES._replace(ignored=_MESSAGES.ignored | {"stop_sequences"}),
    DetokenizeRequest: RouteFields({}),
}
# For each route a struct of the refused fields, which finds them in a body without decoding the rest.
_REFUSED_STRUCTS: Mapping[type, type[Struct]] = {
    form: msgspec.defstruct(f"Refused{form.__name__}", [(name, Any, None) for name in fields.refused])
    for form, fields in ROUTES.items()
}


def refuse_unsupported(body: bytes, request: object) -> None:
    """Raise ApiError or InvalidField for the first field of a body that asks for a missing feature.

    `request` is the same body as the route's struct.
    """
    form = type(request)
    if form not in ROUTES:
        return
    found = msgspec.json.decode(body, type=_REFUSED_STRUCTS[form])
    for name, accepted in ROUTES[form].refused.items():
        value = getattr(found, name)
        if value is None or any(_is_same(value, known) for known in (*_NEUTRAL, *accepted)):
            continue
        if name == "best_of" and isinstance(request, SamplingRequest) and value == (request.n or 1):
            continue
        raise ApiError(400, f"{name} is not supported here: leave it out", param=name, code="not_supported")
    if isinstance(request, SamplingRequest) and request.stream_options is not None and not request.stream:
        raise InvalidField("stream_options", "stream_options is only for requests with stream true")


def _is_same(value: Any, known: Any) -> bool:
    """Compare as JSON does: 1 equals 1.0, and true neither."""
    return isinstance(value, bool) == isinstance(known, bool) and value == known
