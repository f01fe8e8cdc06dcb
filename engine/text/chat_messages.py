"""The messages of a conversation in the form that chat templates of text models expect."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dispec.engine.errors import InvalidField


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Return checked messages. Raises InvalidField with the place.

    Text parts become one string, tool-call arguments in JSON become an object (templates write JSON themselves), and
    fields that are None are dropped (templates test whether they exist). Only the content beside tool calls stays None.
    """
    if not isinstance(messages, list | tuple):
        raise _wrong("messages", f"must be a list, not {type(messages).__name__}")
    if not messages:
        raise _wrong("messages", "must not be empty")
    return [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def plain_data(value: Any, field: str, path: str = "") -> Any:
    """Return a copy in exact JSON types, because other objects may lead out of the sandbox. Raises InvalidField."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_data(item, field, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item, field, f"{path}[{index}]") for index, item in enumerate(value)]
    for exact in (str, int, float):
        if isinstance(value, exact):
            return exact(value)
    raise InvalidField(field, f"{field}{path}: {type(value).__name__} is not JSON data")


def _plain_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(where, f"must be an object, not {type(message).__name__}")
    given = plain_data(message, "messages", where.removeprefix("messages"))
    plain = {key: value for key, value in given.items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise _wrong(f"{where}.role", "must be a string" if "role" in plain else "is missing")
    if "function_call" in plain:
        raise _wrong(f"{where}.function_call", "is not supported, must be given as tool_calls")
    _check_text(plain, "tool_call_id", where)
    _check_text(plain, "name", where)
    _check_tool_calls(plain, where)
    plain["content"] = _content(given, "tool_calls" in plain, f"{where}.content")
    if "reasoning" in plain:  # the newer name of the field that templates know
        plain.setdefault("reasoning_content", plain["reasoning"])
    return plain


def _check_text(given: Mapping[str, Any], name: str, where: str) -> None:
    if not isinstance(given.get(name, ""), str):
        raise _wrong(f"{where}.{name}", "must be a string")


def _check_tool_calls(plain: dict[str, Any], where: str) -> None:
    calls = plain.get("tool_calls", [])
    if not isinstance(calls, list):
        raise _wrong(f"{where}.tool_calls", "must be a list")
    if not calls:  # templates test whether the field exists
        plain.pop("tool_calls", None)
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise _wrong(f"{where}.tool_calls[{index}]", "must be an object with a function")
        _check_text(call, "id", f"{where}.tool_calls[{index}]")
        _check_text(function, "name", f"{where}.tool_calls[{index}].function")
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError):
                raise _wrong(f"{where}.tool_calls[{index}].function.arguments", "is not JSON") from None


def _content(message: Mapping[str, Any], has_tool_calls: bool, where: str) -> str | None:
    """Return the text of a message. OpenAI's clients leave it out beside tool calls, and send null beside a refusal."""
    content = message.get("content")
    if content is not None:
        # Templates that expect null beside tool calls leave the calls out beside an empty text.
        return _text(content, where) or (None if has_tool_calls else "")
    if message["role"] == "assistant":
        if isinstance(message.get("refusal"), str):
            return message["refusal"]
        if has_tool_calls:
            return None
        if "content" in message:
            return ""
    raise _wrong(where, "is missing")


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(where, f"must be a string or a list of parts, not {type(content).__name__}")
    texts = []
    for index, part in enumerate(content):
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _wrong(f"{where}[{index}]", f"parts of type {kind!r} are not supported by this text model")
        texts.append(text)
    return "\n".join(texts)


def _wrong(where: str, what: str) -> InvalidField:
    return InvalidField("messages", f"{where}: {what}")


def with_texts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with an empty text where the content is None."""
    return [{**message, "content": message["content"] or ""} for message in messages]


def with_json_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the arguments of tool calls as JSON text."""
    return [
        {**message, "tool_calls": [_with_json(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else dict(message)
        for message in messages
    ]


def _with_json(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_json(call["function"])}
    if isinstance(call.get("arguments"), str | None):
        return dict(call)
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
