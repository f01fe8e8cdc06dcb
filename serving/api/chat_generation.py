"""A chat in the engine, for all routes that have one: the prompt, the grammar, and the output in its parts."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple

from litestar import Request

from dispec.engine.errors import InvalidField
from dispec.serving.api.context import ServedModel, context_of
from dispec.serving.api.generation import Generation
from dispec.serving.api.protocol import ChatRequest, Usage
from dispec.serving.api.sampling import sampling_params
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

    def __init__(self, model: ServedModel, generation: Generation) -> None:
        self.model = model
        self.generation = generation
        self._parsers = [ChatParser() for _ in range(generation.num_choices)]
        self._has_tool_calls = [False] * generation.num_choices

    @classmethod
    async def start(cls, request: Request, body: ChatRequest) -> "ChatGeneration":
        """Submit a body. Raises InvalidField, ContextOverflow, ApiError, InvalidRequest, Overloaded or NotReady."""
        context = context_of(request)
        model = context.open_model()
        model.check_name(body.model)
        if not body.messages:
            raise InvalidField("messages", "messages is empty: there is nothing to answer")
        prompt = await model.prompts.of_chat(body)
        params = sampling_params(body, model.defaults, len(prompt.token_ids), model.info.max_model_len)
        params = await model.prompts.tokenize_bad_words(params)
        return cls(model, Generation(context, request, body, [prompt], params))

    async def updates(self) -> AsyncIterator[ParsedUpdate]:
        """Yield each update in its parts, as they come."""
        async for index, update in self.generation.updates():
            yield ParsedUpdate(index, update, self._parse(index, update), self._finish_reason(index, update))

    async def collect(self) -> list[ParsedChoice]:
        """Return the choices, when the last has ended."""
        choices = []
        for index, update in enumerate(await self.generation.collect()):
            choices.append(_whole(update, self._parse(index, update), self._finish_reason(index, update) or "stop"))
        return choices

    def usage(self) -> Usage:
        """Return the tokens used so far."""
        return self.generation.usage()

    def _parse(self, index: int, update: ChoiceUpdate) -> list[OutputDelta]:
        parser = self._parsers[index]
        deltas = parser.add(update.text)
        if update.finish_reason is not None:
            deltas += parser.finish()
        self._has_tool_calls[index] |= any(isinstance(delta, ToolCallStart) for delta in deltas)
        return deltas

    def _finish_reason(self, index: int, update: ChoiceUpdate) -> str | None:
        if update.finish_reason == "stop" and self._has_tool_calls[index]:
            return "tool_calls"
        return update.finish_reason


def _whole(update: ChoiceUpdate, deltas: list[OutputDelta], finish_reason: str) -> ParsedChoice:
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    calls = [ToolCall(delta.id, delta.name, "") for delta in deltas if isinstance(delta, ToolCallStart)]
    for delta in deltas:
        if isinstance(delta, ToolCallArguments):
            calls[delta.index] = calls[delta.index]._replace(arguments=calls[delta.index].arguments + delta.text)
    has_content = bool(content) or not calls
    return ParsedChoice(update, content if has_content else None, reasoning or None, tuple(calls), finish_reason)
