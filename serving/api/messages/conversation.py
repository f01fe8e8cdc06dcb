"""Anthropic's messages as those of chat templates. Errors are InvalidField with the place."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from dispec.engine.errors import InvalidField
from dispec.serving.api.messages.protocol import RequestBlock, RequestTurn

# Claude Code writes these roles as well.
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "ctx": "user", "msg": "user"}
_BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
}
# Claude Code's first line of `system`, which is not for the model. It differs between the requests of a conversation,
# and so would keep each prompt from being found in the cache.
_BILLING_HEADER = "x-anthropic-billing-header:"


class Conversation:
    """The messages of a request in OpenAI's form.

    messages: one for each turn, and one for each tool result. Turns of the same role in a row are one message.
    places: of each of `messages`, the place in the request, for errors.
    """

    def __init__(self, system: str | Sequence[RequestBlock] | None, turns: Sequence[RequestTurn]) -> None:
        if not turns:
            raise InvalidField("messages", "messages is empty: there is nothing to answer")
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        self._tools: dict[str, str] = {}  # the name of the tool of each tool_use block, by its id
        self._add_system(system or "")
        for index, turn in enumerate(turns):
            self._add(turn, f"messages[{index}]")

    @property
    def continues(self) -> bool:
        """Whether the last message is the beginning of the answer. Raises InvalidField if it calls tools."""
        last = self.messages[-1]
        if last["role"] == "assistant" and "tool_calls" in last:
            said = f"{self.places[-1]} ends with tool_use, must be followed by a message with the tool_result"
            raise InvalidField("messages", said)
        return last["role"] == "assistant"

    def _add_system(self, system: str | Sequence[RequestBlock]) -> None:
        given = [system] if isinstance(system, str) else _texts(system, "system", "system")
        texts = [text.partition("\n")[2] if text.startswith(_BILLING_HEADER) else text for text in given]
        if any(texts):
            self._extend("system", "system", [text for text in texts if text])

    def _add(self, turn: RequestTurn, place: str) -> None:
        role = _ROLES.get(turn.role)
        if role is None:
            raise InvalidField("messages", f"{place}.role is {turn.role!r:.50}, must be user, assistant or system")
        if isinstance(turn.content, str):
            self._extend(role, place, [turn.content])
        elif role == "assistant":
            self._add_assistant(turn.content, place)
        elif role == "system":
            self._extend(role, place, _texts(turn.content, f"{place}.content", role))
        else:
            self._add_user(turn.content, place)

    def _add_user(self, blocks: Sequence[RequestBlock], place: str) -> None:
        if not blocks:
            self._extend("user", place, [""])
        for block, where in _checked(blocks, f"{place}.content", "user"):
            if block.type == "text":
                self._extend("user", place, [_given(block, "text", where)])
            else:
                self.messages.append(self._tool_message(block, where))
                self.places.append(where)

    def _tool_message(self, block: RequestBlock, where: str) -> dict[str, Any]:
        call = _given(block, "tool_use_id", where)
        if call not in self._tools:
            said = f"{where}.tool_use_id is {call!r:.50}, must be the id of a tool_use block before it"
            raise InvalidField("messages", said)
        content = block.content or ""
        text = content if isinstance(content, str) else "\n".join(_texts(content, f"{where}.content", "system"))
        if block.is_error:  # chat templates know no field for it
            text = f"Error: {text}"
        return {"role": "tool", "tool_call_id": call, "name": self._tools[call], "content": text}

    def _add_assistant(self, blocks: Sequence[RequestBlock], place: str) -> None:
        message = self._open("assistant", place)
        for block, where in _checked(blocks, f"{place}.content", "assistant"):
            if block.type == "text":
                _append_texts(message, [_given(block, "text", where)])
            elif block.type == "thinking":
                thought = _given(block, "thinking", where)
                message["reasoning_content"] = "\n".join(filter(None, (message.get("reasoning_content"), thought)))
            elif block.type == "tool_use":
                message.setdefault("tool_calls", []).append(self._tool_call(block, where))
        if "tool_calls" not in message:
            _append_texts(message, [])

    def _tool_call(self, block: RequestBlock, where: str) -> dict[str, Any]:
        call, name, arguments = (_given(block, field, where) for field in ("id", "name", "input"))
        self._tools[call] = name
        function = {"name": name, "arguments": msgspec.json.encode(arguments).decode()}
        return {"id": call, "type": "function", "function": function}

    def _extend(self, role: str, place: str, texts: Sequence[str]) -> None:
        _append_texts(self._open(role, place), texts)

    def _open(self, role: str, place: str) -> dict[str, Any]:
        """Return the last message if it has this role, else a new one."""
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": None})
            self.places.append(place)
        return self.messages[-1]


def _append_texts(message: dict[str, Any], texts: Sequence[str]) -> None:
    parts = [*(message["content"] or []), *({"type": "text", "text": text} for text in texts)]
    message["content"] = parts


def _texts(blocks: Sequence[RequestBlock], place: str, role: str) -> list[str]:
    return [_given(block, "text", where) for block, where in _checked(blocks, place, role)]


def _checked(blocks: Sequence[RequestBlock], place: str, role: str) -> Iterator[tuple[RequestBlock, str]]:
    """Yield each block with its place. Raises InvalidField for one of another type than the role's."""
    for index, block in enumerate(blocks):
        where = f"{place}[{index}]"
        if block.type not in (known := _BLOCKS[role]):
            said = f"{where}.type is {block.type!r:.50}, must be {' or '.join(known)} here"
            raise InvalidField(place.partition("[")[0], said)
        yield block, where


def _given(block: RequestBlock, field: str, where: str) -> Any:
    value = getattr(block, field)
    if value is None:
        raise InvalidField(where.partition("[")[0], f"{where}.{field} is missing")
    return value
