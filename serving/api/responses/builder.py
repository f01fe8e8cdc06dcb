"""The output of a chat as the items of a response, and as the events of its stream."""

import time
from collections.abc import Sequence
from typing import Any

from dispec.serving.api.http_responses import event
from dispec.serving.api.response_bodies import ChatLogprob, Usage
from dispec.serving.api.responses.input_items import new_id
from dispec.serving.api.responses.protocol import (
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    MessageItem,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponseError,
    ResponseUsage,
)
from dispec.serving.chat_output.deltas import (
    ContentDelta,
    OutputDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)


class ResponseBuilder:
    """Fills a response with items, and returns the events that tell of each change.

    An event's number is its index in the stream. The last item of the response is open: deltas of its kind go on
    there, and those of another kind end it.
    """

    def __init__(self, response: Response, streams: bool) -> None:
        """streams: whether events are made; without it all methods return none."""
        self.response = response
        self._streams = streams
        self._num_events = 0
        self._events: list[bytes] = []
        self._open: MessageItem | ReasoningItem | FunctionCallItem | None = None
        self._logprobs: list[ChatLogprob] = []  # of tokens that have completed no text

    def start(self) -> list[bytes]:
        """Begin the stream."""
        self._emit("response.created", response=self.response)
        self._emit(f"response.{self.response.status}", response=self.response)
        return self._take()

    def begin_work(self) -> list[bytes]:
        """Leave the queue, if the response has waited there."""
        if self.response.status == "queued":
            self.response.status = "in_progress"
            self._emit("response.in_progress", response=self.response)
        return self._take()

    def add(self, deltas: Sequence[OutputDelta], logprobs: Sequence[ChatLogprob] = ()) -> list[bytes]:
        """Add deltas, and the log-probabilities of their tokens, of which those of texts are kept."""
        if not all(isinstance(delta, ContentDelta) for delta in deltas):
            self._logprobs = []
        elif deltas and self._open is not None and not isinstance(self._open, MessageItem):
            self._logprobs = list(logprobs)  # without those of the marker after the open item
        else:
            self._logprobs += logprobs
        for delta in deltas:
            match delta:
                case ReasoningDelta():
                    self._add_reasoning(delta.text)
                case ContentDelta():
                    self._add_text(delta.text)
                case ToolCallStart():
                    call = FunctionCallItem(
                        id=new_id("fc"), call_id=delta.id, name=delta.name, arguments="", status="in_progress"
                    )
                    self._start_item(call)
                case ToolCallArguments() if isinstance(self._open, FunctionCallItem):
                    self._open.arguments += delta.text
                    self._emit_of_item("response.function_call_arguments.delta", delta=delta.text)
        return self._take()

    def finish(self, finish_reason: str, usage: Usage) -> list[bytes]:
        """End the response. finish_reason: the chat's."""
        if not self.response.output:
            self._add_text("")
        is_cut = finish_reason == "length"
        self._end_item("incomplete" if is_cut else "completed")
        self.response.usage = _usage(usage)
        if is_cut:
            self.response.incomplete_details = IncompleteDetails("max_output_tokens")
            return self._end("incomplete")
        self.response.completed_at = int(time.time())
        return self._end("completed")

    def fail(self, message: str) -> list[bytes]:
        """End the response with an error."""
        self._end_item("incomplete")
        self.response.error = ResponseError("server_error", message)
        return self._end("failed")

    def cancel(self) -> list[bytes]:
        """End the response because a client has asked for it."""
        self._end_item("incomplete")
        self.response.status = "cancelled"
        self._emit("response.incomplete", response=self.response)
        return self._take()

    def _end(self, status: Any) -> list[bytes]:
        self.response.status = status
        self._emit(f"response.{status}", response=self.response)
        return self._take()

    def _add_reasoning(self, text: str) -> None:
        if not isinstance(self._open, ReasoningItem):
            self._start_item(ReasoningItem(id=new_id("rs"), content=[], status="in_progress"))
            self._start_part(ReasoningText(""))
        self._open.content[0].text += text  # type: ignore[union-attr]
        self._emit_of_item("response.reasoning_text.delta", content_index=0, delta=text)

    def _add_text(self, text: str) -> None:
        if not isinstance(self._open, MessageItem):
            self._start_item(MessageItem(id=new_id("msg"), content=[], status="in_progress"))
            self._start_part(OutputText(""))
        if not text and not self._logprobs:
            return
        part = self._open.content[0]  # type: ignore[union-attr]
        part.text += text
        logprobs, self._logprobs = self._logprobs, []
        if isinstance(part, OutputText):
            part.logprobs += logprobs
        self._emit_of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _start_item(self, item: MessageItem | ReasoningItem | FunctionCallItem) -> None:
        self._end_item("completed")
        self.response.output.append(item)
        self._open = item
        self._emit("response.output_item.added", output_index=len(self.response.output) - 1, item=item)

    def _start_part(self, part: OutputText | ReasoningText) -> None:
        self._emit_of_item("response.content_part.added", content_index=0, part=part)
        self._open.content.append(part)  # type: ignore[union-attr, arg-type]

    def _end_item(self, status: ItemStatus) -> None:
        item = self._open
        if item is None:
            return
        if isinstance(item, FunctionCallItem):
            self._emit_of_item("response.function_call_arguments.done", name=item.name, arguments=item.arguments)
        else:
            part = item.content[0]
            if isinstance(part, OutputText):
                part.logprobs += self._logprobs
                self._logprobs = []
                done = {"text": part.text, "logprobs": part.logprobs}
                self._emit_of_item("response.output_text.done", content_index=0, **done)
            else:
                self._emit_of_item("response.reasoning_text.done", content_index=0, text=part.text)
            self._emit_of_item("response.content_part.done", content_index=0, part=part)
        item.status = status
        self._emit("response.output_item.done", output_index=len(self.response.output) - 1, item=item)
        self._open = None

    def _emit_of_item(self, kind: str, **fields: Any) -> None:
        """Add an event about the open item."""
        if self._open is not None:
            self._emit(kind, item_id=self._open.id, output_index=len(self.response.output) - 1, **fields)

    def _emit(self, kind: str, **fields: Any) -> None:
        if self._streams:
            data = {"type": kind, "sequence_number": self._num_events, **fields}
            self._events.append(event(data, kind.encode()))
            self._num_events += 1

    def _take(self) -> list[bytes]:
        events, self._events = self._events, []
        return events


def _usage(usage: Usage) -> ResponseUsage:
    details = usage.completion_tokens_details
    reasoning = getattr(details, "reasoning_tokens", 0) or 0
    return ResponseUsage(
        usage.prompt_tokens,
        InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
        usage.completion_tokens,
        OutputTokensDetails(reasoning),
        usage.total_tokens,
    )
