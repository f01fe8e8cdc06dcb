"""The turns of a conversation: as a prompt that fits the context, and as a JSON file of messages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from dispec.serving.cli.console import say


class Turn(NamedTuple):
    """A question and its answer, which may have been stopped."""

    question: str
    answer: str


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


def messages_of(turns: list[Turn], system: str | None) -> list[dict[str, str]]:
    """Return a conversation in the form of OpenAI's API."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    return messages


def fit(
    turns: list[Turn],
    question: str,
    system: str | None,
    tokenize: Callable[[list[dict[str, str]]], list[int]],
    max_model_len: int,
    max_tokens: int,
) -> tuple[list[int], list[Turn]]:
    """Return the prompt of a conversation and the turns that it holds, without the oldest ones that do not fit.

    Room is kept for an answer of `max_tokens` tokens, or of a quarter of the context if that is less. The question
    always stays, so that a prompt without turns may still be too long.
    """
    room = min(max_tokens, max_model_len // 4)
    kept = turns
    while True:
        prompt = tokenize([*messages_of(kept, system), {"role": "user", "content": question}])
        if not kept or len(prompt) + room <= max_model_len:
            break
        kept = kept[1:]
    if dropped := len(turns) - len(kept):
        what = "oldest turn is" if dropped == 1 else f"{dropped} oldest turns are"
        say(f"the conversation no longer fits {max_model_len} tokens: its {what} forgotten")
    return prompt, kept


def write_conversation(path: Path, turns: list[Turn], system: str | None) -> None:
    """Write a JSON list of messages. Raises OSError."""
    text = json.dumps(messages_of(turns, system), ensure_ascii=False, indent=2)
    path.write_text(f"{text}\n", encoding="utf-8")


def read_conversation(path: Path) -> tuple[list[Turn], str | None]:
    """Return the turns and the system message of a JSON list of messages.

    Raises OSError, and ValueError for a file that is no such list, or one with questions and answers in another order.
    """
    try:
        messages = msgspec.json.decode(path.read_bytes(), type=list[_Message])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON list of messages with role and content: {error}") from error
    system = messages.pop(0).content if messages and messages[0].role == "system" else None
    for index, message in enumerate(messages):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            raise ValueError(f"{path}: message {index + 1 + (system is not None)} is of {message.role}, not {expected}")
    if len(messages) % 2:
        raise ValueError(f"{path} ends with a question, must end with an answer")
    return [Turn(one.content, other.content) for one, other in zip(messages[::2], messages[1::2], strict=True)], system
