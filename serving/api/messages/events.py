"""Messages and streams of Anthropic's API from the output of a chat."""

import json
from collections.abc import AsyncIterator, Iterator

import msgspec
from msgspec import UNSET

from dispec.serving.api.chat_generation import ChatGeneration, ParsedChoice
from dispec.serving.api.http_responses import StreamForm, event
from dispec.serving.api.messages.protocol import (
    Block,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJsonDelta,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    MessageUsage,
    OutputTokensDetails,
    Ping,
    SignatureDelta,
    StopDelta,
    StreamEvent,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from dispec.serving.chat_output.deltas import ContentDelta, OutputDelta, ReasoningDelta, ToolCallStart
from dispec.serving.client.request_stream import ChoiceUpdate

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
INVALID_JSON = "INVALID_JSON"  # Anthropic's key for an input that is no JSON object


def encode_event(data: StreamEvent) -> bytes:
    """Return an event whose name is its type."""
    return event(data, str(data.__struct_config__.tag).encode())


ANTHROPIC_STREAM = StreamForm(
    end=b"",
    keep_alive=encode_event(Ping()),
    error=lambda error, scope: event(msgspec.Raw(error.body(scope)), b"error"),
)


class MessageResponses:
    """Makes the message or the events of one chat. max_tokens: the request's."""

    def __init__(self, chat: ChatGeneration, max_tokens: int) -> None:
        self._chat = chat
        self._max_tokens = max_tokens

    def whole(self, choice: ParsedChoice) -> Message:
        """Return the message of an output that has ended."""
        content: list[Block] = []
        if choice.reasoning is not None:
            content.append(ThinkingBlock(choice.reasoning))
        if choice.content:
            content.append(TextBlock(choice.content))
        content += [ToolUseBlock(call.id, call.name, tool_input(call.arguments)) for call in choice.tool_calls]
        message = self._message(content)
        stop = self._stop(choice.finish_reason, choice.update)
        message.stop_reason, message.stop_sequence = stop.stop_reason, stop.stop_sequence
        if self._chat.generation.transfer.response:
            message.kv_transfer_params = self._chat.generation.transfer.response
        return message

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the events of each update. The first update has the number of cached tokens, which begins a message."""
        blocks = _StreamedBlocks()
        has_begun = False
        async for update in self._chat.updates():
            found: list[StreamEvent] = []
            if not has_begun:
                found.append(MessageStart(self._message([])))
                has_begun = True
            for delta in update.deltas:
                found += blocks.add(delta)
            if update.finish_reason is not None:
                found += blocks.end()
                found.append(MessageDelta(self._stop(update.finish_reason, update.update), self._usage()))
                found.append(MessageStop())
            if found:
                yield b"".join(map(encode_event, found))

    def _message(self, content: list[Block]) -> Message:
        message_id = f"msg_{self._chat.generation.request_id}"
        return Message(message_id, self._chat.model.name, content, None, None, self._usage())

    def _stop(self, finish_reason: str, update: ChoiceUpdate) -> StopDelta:
        if finish_reason != "length" and isinstance(update.stop_reason, str):
            return StopDelta("stop_sequence", update.stop_reason)
        reason = _STOP_REASONS[finish_reason]
        room = self._chat.model.info.max_model_len - self._chat.generation.prompt_tokens
        if finish_reason == "length" and room < self._max_tokens:
            reason = "model_context_window_exceeded"
        return StopDelta(reason, None)

    def _usage(self) -> MessageUsage:
        usage = self._chat.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        found = MessageUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached)
        details = usage.completion_tokens_details
        if details is not UNSET and details.reasoning_tokens is not UNSET:
            found.output_tokens_details = OutputTokensDetails(details.reasoning_tokens)
        return found


class _StreamedBlocks:
    """The blocks of a streamed message, one after another."""

    def __init__(self) -> None:
        self._index = -1  # of the last block
        self._open: str | None = None  # its type, until it ends

    def add(self, delta: OutputDelta) -> Iterator[StreamEvent]:
        """Yield the events of a delta."""
        match delta:
            case ReasoningDelta():
                if self._open != "thinking":
                    yield from self._begin("thinking", ThinkingBlock(""))
                yield ContentBlockDelta(self._index, ThinkingDelta(delta.text))
            case ContentDelta():
                if self._open != "text":
                    yield from self._begin("text", TextBlock(""))
                yield ContentBlockDelta(self._index, TextDelta(delta.text))
            case ToolCallStart():
                yield from self._begin("tool_use", ToolUseBlock(delta.id, delta.name, {}))
            case _:
                yield ContentBlockDelta(self._index, InputJsonDelta(delta.text))

    def end(self) -> Iterator[StreamEvent]:
        """Yield the end of the last block."""
        if self._open is None:
            return
        if self._open == "thinking":
            yield ContentBlockDelta(self._index, SignatureDelta())
        yield ContentBlockStop(self._index)
        self._open = None

    def _begin(self, kind: str, block: Block) -> Iterator[StreamEvent]:
        yield from self.end()
        self._index += 1
        self._open = kind
        yield ContentBlockStart(self._index, block)


def tool_input(arguments: str) -> dict[str, object]:
    """Return the input of a call, which a model without a grammar may write wrongly or a limit may cut."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {INVALID_JSON: arguments}
