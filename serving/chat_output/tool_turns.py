"""Conversations with tools in the forms that some chat templates demand."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dispec.engine.text.chat_messages import plain_messages

_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")


def one_call_a_message(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in which an assistant's message has one call at most, and is followed by its result.

    Raises InvalidField for messages of a wrong form.
    """
    split: list[dict[str, Any]] = []
    plain = plain_messages(messages)
    plain.reverse()
    while plain:
        message = plain.pop()
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            split.append(message)
            continue
        results = []
        while plain and plain[-1]["role"] == "tool":
            results.append(plain.pop())
        for index, call in enumerate(calls):
            split.append({**message, "tool_calls": [call]} | ({"content": None} if index else {}))
            is_last = index == len(calls) - 1
            of_call = [result for result in results if is_last or result.get("tool_call_id") == call.get("id")]
            results = [result for result in results if result not in of_call]
            split += of_call
    return split


def with_short_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in which ids of calls are nine letters and digits, as Mistral's templates demand.

    Others, of clients or of other models, become a hash. Raises InvalidField for messages of a wrong form.
    """
    plain = plain_messages(messages)
    for message in plain:
        for holder, name in [(message, "tool_call_id"), *((call, "id") for call in message.get("tool_calls", []))]:
            if isinstance(given := holder.get(name), str) and not _SHORT_ID.fullmatch(given):
                holder[name] = hashlib.sha256(given.encode(errors="replace")).hexdigest()[:9]
    return plain
