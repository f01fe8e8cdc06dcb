"""A chat in the engine, for all routes that have one: the prompt, the grammar, and the output in its parts."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple

from litestar import Request

from dispec.serving.api.chat_request import PreparedChat, prepare_chat
from dispec.serving.api.context import context_of
from dispec.serving.api.generation import Generation
from dispec.serving.api.protocol import ChatRequest
from dispec.serving.api.response_bodies import CompletionTokensDetails, Usage
from dispec.serving.chat_output.chat_parser import ChatParser
from dispec.serving.chat_output.deltas import (
    ContentDelta,
    OutputDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from dispec.serving.chat_output.tools import ToolCall
from dispec.serving.client.request_stream import ChoiceUpdate


class ParsedChoice(NamedTuple):
    """A whole choice. content: None where the choice has tool calls and no text. reasoning: None without any.

    finish_reason: OpenAI's, with "tool_calls".
    """

    update: ChoiceUpdate
    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class ParsedUpdate:
    """The next part of a choice. finish_reason: as in `ParsedChoice`; None before the end."""

    index: int
    update: ChoiceUpdate
    deltas: list[OutputDelta]
    finish_reason: str | None


class ChatGeneration:
    """A chat that was submitted to the engine, and must be aborted in the end."""

    def __init__(self, chat: PreparedChat, generation: Generation, includes_reasoning: bool = True) -> None:
        self.model = chat.model
        self.generation = generation
        self._has_reasoning = chat.reasoning is not None
        self._includes_reasoning = includes_reasoning
        reasoning_end = chat.reasoning_end_token_ids
        self._choices = [_Choice(chat.parser(), reasoning_end) for _ in range(generation.num_choices)]

    @classmethod
    async def start(cls, request: Request, body: ChatRequest) -> "ChatGeneration":
        """Submit a body. Raises InvalidField, ContextOverflow, ApiError, InvalidRequest, Overloaded or NotReady."""
        context = context_of(request)
        model = context.open_model()
        model.check_name(body.model)
        chat = await prepare_chat(model, body)
        generation = Generation(context, request, body, [chat.prompt], chat.params, chat.kept_token_ids)
        return cls(chat, generation, body.include_reasoning is not False)

    async def updates(self) -> AsyncIterator[ParsedUpdate]:
        """Yield each update in its parts, as they come."""
        async for index, update in self.generation.updates():
            deltas, finish_reason = self._parse(index, update)
            yield ParsedUpdate(index, update, deltas, finish_reason)

    async def collect(self) -> list[ParsedChoice]:
        """Return the choices, when the last has ended."""
        choices = []
        for index, update in enumerate(await self.generation.collect()):
            deltas, finish_reason = self._parse(index, update)
            choices.append(_whole(update, deltas, finish_reason or "stop"))
        return choices

    def usage(self) -> Usage:
        """Return the tokens used so far."""
        usage = self.generation.usage()
        if self._has_reasoning:
            details = usage.completion_tokens_details or CompletionTokensDetails(0, 0)
            details.reasoning_tokens = sum(choice.num_reasoning_tokens for choice in self._choices)
            usage.completion_tokens_details = details
        return usage

    def _parse(self, index: int, update: ChoiceUpdate) -> tuple[list[OutputDelta], str | None]:
        """Return the parts of an update, and its choice's finish reason."""
        choice = self._choices[index]
        deltas = choice.parse(update)
        if not self._includes_reasoning:
            deltas = [delta for delta in deltas if not isinstance(delta, ReasoningDelta)]
        return (
            deltas,
            "tool_calls" if update.finish_reason == "stop" and choice.has_tool_calls else update.finish_reason,
        )


class _Choice:
    """The parser of a choice, and what it has found so far."""

    def __init__(self, parser: ChatParser, reasoning_end_token_ids: tuple[int, ...]) -> None:
        self.has_tool_calls = False
        self._parser = parser
        self._reasoning_end = reasoning_end_token_ids
        self._reasoning_token_ids: list[int] = []

    @property
    def num_reasoning_tokens(self) -> int:
        """The number of tokens of the reasoning, with its markers."""
        return len(self._reasoning_token_ids) if self._parser.has_reasoning else 0

    def parse(self, update: ChoiceUpdate) -> list[OutputDelta]:
        may_be_reasoning = self._parser.may_be_reasoning
        deltas = self._parser.add(update.text)
        if update.finish_reason is not None:
            deltas += self._parser.finish()
        if may_be_reasoning:
            self._reasoning_token_ids += update.token_ids
            if not self._parser.may_be_reasoning:
                self._reasoning_token_ids = _until(self._reasoning_token_ids, self._reasoning_end)
        self.has_tool_calls = self.has_tool_calls or any(isinstance(delta, ToolCallStart) for delta in deltas)
        return deltas


def _until(token_ids: list[int], marker: tuple[int, ...]) -> list[int]:
    """Return the tokens up to the marker and with it; all if the text of the marker is other tokens."""
    for end in range(len(marker), len(token_ids) + 1):
        if tuple(token_ids[end - len(marker) : end]) == marker:
            return token_ids[:end]
    return token_ids


def _whole(update: ChoiceUpdate, deltas: list[OutputDelta], finish_reason: str) -> ParsedChoice:
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    calls = [ToolCall(delta.id, delta.name, "") for delta in deltas if isinstance(delta, ToolCallStart)]
    for delta in deltas:
        if isinstance(delta, ToolCallArguments):
            calls[delta.index] = calls[delta.index]._replace(arguments=calls[delta.index].arguments + delta.text)
    has_content = bool(content) or not calls
    return ParsedChoice(update, content if has_content else None, reasoning or None, tuple(calls), finish_reason)
