"""From the body of /v1/responses to a chat: the fields in their chat form, and errors with the body's own names."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dispec.engine.errors import InvalidField
from dispec.engine.sampling_params import MAX_LOGPROBS
from dispec.serving.api.protocol import ChatRequest, GenerationRequestFields
from dispec.serving.api.request_body import format_value
from dispec.serving.api.response_protocol import (
    INCLUDABLE,
    LOGPROBS,
    MAX_METADATA,
    MAX_METADATA_KEY,
    MAX_METADATA_VALUE,
    ResponsesRequest,
    TextFormat,
)
from dispec.serving.client.errors import InvalidRequest
from dispec.serving.http.errors import ApiError

# The names of a chat's fields in this API: the field of an error, and how the message has it.
_OWN_NAMES = {
    "max_tokens": ("max_output_tokens", "max_output_tokens"),
    "messages": ("input", "input"),
    "response_format": ("text", "text.format"),
    "reasoning_effort": ("reasoning", "reasoning.effort"),
    "tools": ("tools", "tools"),
    "tool_choice": ("tool_choice", "tool_choice"),
}


def check_request(body: ResponsesRequest, max_stored: int) -> None:
    """Raise InvalidField or ApiError for fields that break a rule of their own. max_stored: responses that are kept."""
    if body.background:
        if body.store is False:
            raise InvalidField("background", "background is true and store is false: such a response cannot be read")
        if not max_stored:
            raise InvalidField("background", "background is true, and this server stores no responses")
    if body.stream_options is not None and not body.stream:
        raise InvalidField("stream_options", "stream_options is only for requests with stream true")
    if body.truncation not in (None, "auto", "disabled"):
        raise InvalidField("truncation", f"truncation is {body.truncation!r:.50}, must be auto or disabled")
    for name in body.include or ():
        if name not in INCLUDABLE:
            raise InvalidField("include", f"include has {name!r:.70}, must be of {', '.join(sorted(INCLUDABLE))}")
    if body.max_tool_calls is not None and body.max_tool_calls < 1:
        raise InvalidField("max_tool_calls", f"max_tool_calls is {body.max_tool_calls}, must be at least 1")
    _check_top_logprobs(body)
    _check_metadata(body.metadata or {})
    for field, value, accepted in _unsupported(body):
        if value not in (None, *accepted):
            top = field.partition(".")[0]
            raise ApiError(400, f"{field} is not supported here: leave it out", param=top, code="not_supported")


def _unsupported(body: ResponsesRequest) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield nested fields that ask for missing features, with their values and the values that ask for nothing."""
    if body.text is not None:
        yield "text.verbosity", body.text.verbosity, ("medium",)
    if body.reasoning is not None:
        # "auto" is the best summary that there is: this server has none, and gives the reasoning itself.
        yield "reasoning.summary", body.reasoning.summary, ("auto",)
        yield "reasoning.generate_summary", body.reasoning.generate_summary, ("auto",)
        yield "reasoning.context", body.reasoning.context, ("auto", "all_turns")
        yield "reasoning.mode", body.reasoning.mode, ("standard",)
    if body.stream_options is not None:
        yield "stream_options.include_obfuscation", body.stream_options.include_obfuscation, (False,)
    if body.prompt_cache_options is not None:
        yield "prompt_cache_options.prewarm", body.prompt_cache_options.prewarm, (False,)


def _check_top_logprobs(body: ResponsesRequest) -> None:
    top = body.top_logprobs
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        said = f"top_logprobs is {format_value(top)}, must be between 0 and {MAX_LOGPROBS}"
        raise InvalidField("top_logprobs", said)
    if top and not wants_logprobs(body):
        raise InvalidField("top_logprobs", f"top_logprobs is {top}, must come with include {LOGPROBS}")


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > MAX_METADATA:
        raise InvalidField("metadata", f"metadata holds {len(metadata)} pairs, must be at most {MAX_METADATA}")
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY:
            said = f"metadata has a key of {len(key)} characters, must be at most {MAX_METADATA_KEY}"
            raise InvalidField("metadata", said)
        if len(value) > MAX_METADATA_VALUE:
            said = f"metadata.{key} has {len(value)} characters, must be at most {MAX_METADATA_VALUE}"
            raise InvalidField("metadata", said)


def wants_logprobs(body: ResponsesRequest) -> bool:
    return LOGPROBS in (body.include or ())


def to_chat_request(body: ResponsesRequest, messages: list[dict[str, Any]]) -> ChatRequest:
    """Return the chat that a checked body asks for. Raises InvalidField or ApiError for its tools."""
    shared = {name: getattr(body, name) for name in GenerationRequestFields.__struct_fields__}
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]
    text_format = body.text.format if body.text is not None else None
    return ChatRequest(
        **shared,
        messages=messages,
        max_tokens=body.max_output_tokens,
        logprobs=wants_logprobs(body) or None,
        top_logprobs=body.top_logprobs if wants_logprobs(body) else None,
        tools=tools or None,
        tool_choice=_tool_choice(body.tool_choice, bool(tools)),
        parallel_tool_calls=body.parallel_tool_calls if tools else None,
        response_format=None if text_format is None else _response_format(text_format),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        chat_template_kwargs=body.chat_template_kwargs,
        allow_special_tokens_in_content=body.allow_special_tokens_in_content,
    )


def _response_format(given: TextFormat) -> dict[str, Any] | None:
    if given.type == "text":
        return None
    if given.type != "json_schema":
        return {"type": given.type}
    for name in ("name", "schema"):
        if getattr(given, name) is None:
            raise InvalidField("text", f"text.format.{name} is missing")
    fields = {name: getattr(given, name) for name in ("name", "schema", "strict", "description")}
    schema = {name: value for name, value in fields.items() if value is not None}
    return {"type": "json_schema", "json_schema": schema}


def _tool_choice(given: str | dict[str, Any] | None, has_tools: bool) -> str | dict[str, Any] | None:
    """Return a choice in the form of chats. Without tools it may be one that asks for none."""
    if not isinstance(given, dict):
        return given if has_tools or given not in ("auto", "none") else None
    kind = given.get("type")
    if kind == "function":
        return _named(given, "tool_choice")
    if kind != "allowed_tools":
        raise _unsupported_type("tool_choice", "tool_choice.type", kind, "function or allowed_tools")
    tools = given.get("tools")
    if not isinstance(tools, list):
        raise InvalidField("tool_choice", f"tool_choice.tools is {format_value(tools)}, must be a list of functions")
    named = [_named(tool, f"tool_choice.tools[{index}]") for index, tool in enumerate(tools)]
    return {"type": kind, kind: {"mode": given.get("mode"), "tools": named}}


def _named(given: Any, where: str) -> dict[str, Any]:
    """Return a choice of one function in the form of chats."""
    if not isinstance(given, Mapping) or given.get("type", "function") != "function":
        raise InvalidField("tool_choice", f"{where} is {format_value(given)}, must be a function")
    return {"type": "function", "function": {"name": given.get("name")}}


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a function in the form of chats."""
    if tool.get("type") != "function":
        raise _unsupported_type("tools", f"{where}.type", tool.get("type"), "function")
    for name, accepted in (("async", (None, False)), ("defer_loading", (None, False))):
        if tool.get(name) not in accepted:
            raise ApiError(400, f"{where}.{name} is not supported here", param="tools", code="not_supported")
    callers = tool.get("allowed_callers")
    if callers is not None and callers != ["direct"]:
        raise ApiError(400, f"{where}.allowed_callers is not supported here", param="tools", code="not_supported")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _unsupported_type(field: str, where: str, kind: Any, must_be: str) -> Exception:
    if not isinstance(kind, str):
        return InvalidField(field, f"{where} is {format_value(kind)}, must be {must_be}")
    said = f"{where} is {kind!r:.50}, must be {must_be}: this server runs no tools itself"
    return ApiError(400, said, param=field, code="not_supported")


@contextmanager
def own_names(places: Sequence[str]) -> Iterator[None]:
    """Give errors about a chat the names that the body has. places: of the chat's messages, in the body."""
    try:
        yield
    except (InvalidField, InvalidRequest) as error:
        if error.field in _OWN_NAMES:
            said = str(error)
            field, name = _OWN_NAMES[error.field]
            if error.field == "messages":
                said = re.sub(r"\bmessages\[(\d+)\]", lambda found: _place(places, int(found[1])), said)
            elif error.field in ("tools", "tool_choice"):
                said = said.replace(".function.", ".").replace("tool_choice.allowed_tools.", "tool_choice.")
            said = re.sub(rf"\b{error.field}\b", name, said).replace("text.format.json_schema.", "text.format.")
            error.args, error.field = (said,), field
        raise


def _place(places: Sequence[str], index: int) -> str:
    return places[index] if index < len(places) else "input"
