"""The items of a conversation as /v1/responses has them: checked, with ids, and as messages for the chat template."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dispec.engine.errors import InvalidField
from dispec.serving.api.request_body import format_value

Item = dict[str, Any]

_ROLES = ("user", "assistant", "system", "developer")
_KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")


def new_id(prefix: str) -> str:
    """Return an id that is unique in all servers: msg_…, fc_…, rs_…, resp_…."""
    return f"{prefix}_{uuid.uuid4().hex}"


def read_items(given: str | Sequence[Item], find_item: Callable[[str], Item | None]) -> list[Item]:
    """Return the items of a request's `input` in full, each with its type, its id and its content as parts.

    find_item: returns the stored item of an id, for references. Raises InvalidField with the place.
    """
    if not given:
        raise InvalidField("input", "input is empty: there is nothing to answer")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_read(item, f"input[{index}]", find_item) for index, item in enumerate(given)]


def _read(item: Item, where: str, find_item: Callable[[str], Item | None]) -> Item:
    kind = item.get("type")
    if kind is None:
        kind = "item_reference" if "id" in item and "content" not in item else "message"
    match kind:
        case "message":
            return _message(item, where)
        case "function_call":
            return {
                "type": kind,
                "id": _id(item, "fc"),
                "call_id": _text(item, "call_id", where),
                "name": _text(item, "name", where),
                "arguments": _text(item, "arguments", where),
                "status": "completed",
            }
        case "function_call_output":
            output = item.get("output")
            if not isinstance(output, str):
                output = _parts(output, f"{where}.output", "input_text")
            call_id = _text(item, "call_id", where)
            return {"type": kind, "id": _id(item, "fco"), "call_id": call_id, "output": output, "status": "completed"}
        case "reasoning":
            return _reasoning(item, where)
        case "item_reference":
            id = _text(item, "id", where)
            found = find_item(id)
            if found is None:
                raise InvalidField("input", f"{where}.id is {format_value(id)}, which no stored response has")
            return found
    known = ", ".join(_KINDS)
    raise InvalidField("input", f"{where}.type is {format_value(kind)}, must be one of {known}")


def _message(item: Item, where: str) -> Item:
    role = item.get("role")
    if role not in _ROLES:
        said = "is missing" if role is None else f"is {format_value(role)}, must be one of {', '.join(_ROLES)}"
        raise InvalidField("input", f"{where}.role {said}")
    kind = "output_text" if role == "assistant" else "input_text"
    content = _parts(item.get("content"), f"{where}.content", kind)
    return {"type": "message", "id": _id(item, "msg"), "role": role, "status": "completed", "content": content}


def _parts(content: Any, where: str, kind: str) -> list[Item]:
    """Return a content as text parts of one type."""
    if isinstance(content, str):
        content = [{"type": kind, "text": content}]
    if not isinstance(content, list):
        said = "is missing" if content is None else f"is {format_value(content)}, must be a text or a list of parts"
        raise InvalidField("input", f"{where} {said}")
    found: list[Item] = []
    for index, part in enumerate(content):
        given = part.get("type") if isinstance(part, Mapping) else None
        if given not in _TEXT_PARTS:
            said = f"{where}[{index}].type is {format_value(given)}, must be input_text or output_text"
            raise InvalidField("input", f"{said}: this model reads texts")
        text = _text(part, "refusal" if given == "refusal" else "text", f"{where}[{index}]")
        found.append({"type": kind, "text": text} | ({"annotations": []} if kind == "output_text" else {}))
    return found


def _reasoning(item: Item, where: str) -> Item:
    content, summary = item.get("content") or [], item.get("summary") or []
    if item.get("encrypted_content") and not content:
        said = "this server cannot read it, and gives reasoning as plain content"
        raise InvalidField("input", f"{where}.encrypted_content is not supported: {said}")
    found: Item = {"type": "reasoning", "id": _id(item, "rs"), "status": "completed"}
    for name, parts, kind in (("content", content, "reasoning_text"), ("summary", summary, "summary_text")):
        if not isinstance(parts, list):
            raise InvalidField("input", f"{where}.{name} is {format_value(parts)}, must be a list of parts")
        places = [(part, f"{where}.{name}[{index}]") for index, part in enumerate(parts)]
        found[name] = [{"type": kind, "text": _text(part, "text", place)} for part, place in places]
    return found


def _text(item: Any, name: str, where: str) -> str:
    value = item.get(name) if isinstance(item, Mapping) else None
    if not isinstance(value, str):
        said = "is missing" if value is None else f"is {format_value(value)}, must be a text"
        raise InvalidField("input", f"{where}.{name} {said}")
    return value


def _id(item: Item, prefix: str) -> str:
    given = item.get("id")
    return given if isinstance(given, str) and given else new_id(prefix)


class Conversation(NamedTuple):
    """Messages for the chat template, and for each the place that it comes from, for errors."""

    messages: list[dict[str, Any]]
    places: list[str]


def to_conversation(instructions: str | None, previous: Sequence[Item], items: Sequence[Item]) -> Conversation:
    """Return the messages of items that `read_items` returned.

    previous: the items of earlier responses. The reasoning, text and function calls of one turn become one message.
    Raises InvalidField for the output of a function call that the conversation does not have.
    """
    conversation = Conversation([], [])
    if instructions:
        conversation.messages.append({"role": "system", "content": instructions})
        conversation.places.append("instructions")
    names: dict[str, str] = {}  # of called functions, by call id
    for index, item in enumerate((*previous, *items)):
        is_new = index >= len(previous)
        place = f"input[{index - len(previous)}]" if is_new else "the input of previous_response_id"
        match item["type"]:
            case "message":
                parts = [{"type": "text", "text": part["text"]} for part in item["content"]]
                if item["role"] == "assistant":
                    _assistant(conversation, place, "reasoning_content")["content"] = parts
                else:
                    conversation.messages.append({"role": item["role"], "content": parts})
                    conversation.places.append(place)
            case "reasoning":
                texts = [part["text"] for part in item["content"] or item["summary"]]
                if texts:
                    message = _assistant(conversation, place, "reasoning_content")
                    texts = [message["reasoning_content"], *texts] if "reasoning_content" in message else texts
                    message["reasoning_content"] = "\n".join(texts)
            case "function_call":
                names[item["call_id"]] = item["name"]
                function = {"name": item["name"], "arguments": item["arguments"]}
                message = _assistant(conversation, place, "reasoning_content", "content", "tool_calls")
                message.setdefault("tool_calls", []).append(
                    {"id": item["call_id"], "type": "function", "function": function}
                )
            case "function_call_output":
                call_id = item["call_id"]
                if call_id not in names:
                    said = f"{place}.call_id is {format_value(call_id)}, which no function call before it has"
                    raise InvalidField("input", said)
                output = item["output"]
                text = output if isinstance(output, str) else "\n".join(part["text"] for part in output)
                message = {"role": "tool", "tool_call_id": call_id, "name": names[call_id], "content": text}
                conversation.messages.append(message)
                conversation.places.append(place)
    return conversation


def _assistant(conversation: Conversation, place: str, *may_have: str) -> dict[str, Any]:
    """Return the assistant's message that goes on: the last one if it has no more than these fields, or a new one."""
    messages, places = conversation
    if messages and messages[-1]["role"] == "assistant":
        filled = {name for name, value in messages[-1].items() if value is not None} - {"role"}
        if filled <= set(may_have):
            return messages[-1]
    messages.append({"role": "assistant", "content": None})
    places.append(place)
    return messages[-1]
