"""One response under way: the chat in the engine, and the response that is built from its output."""

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from litestar.types import Scope

from dispec.serving.api.chat_generation import ChatGeneration, ParsedChoice
from dispec.serving.api.logprobs import chat_logprobs
from dispec.serving.api.response_bodies import ChatLogprob
from dispec.serving.api.responses.builder import ResponseBuilder
from dispec.serving.api.responses.input_items import Item
from dispec.serving.api.responses.protocol import Response
from dispec.serving.api.responses.store import ResponseStore, StoredResponse
from dispec.serving.chat_output.deltas import (
    ContentDelta,
    OutputDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from dispec.serving.client.request_stream import ChoiceUpdate
from dispec.serving.http.errors import log_error, to_api_error


class RunOptions(NamedTuple):
    """streams: whether events are made. num_logprobs: likeliest tokens at each place; None without log-probabilities.

    stores_at_end: whether the response is stored when it ends.
    """

    streams: bool
    num_logprobs: int | None
    stores_at_end: bool


class ResponseRun:
    """Runs to the end once, by `whole` or by `batches`, or ends early by `abort` or `cancel`."""

    def __init__(
        self,
        scope: Scope,
        chat: ChatGeneration,
        response: Response,
        items: list[Item],
        store: ResponseStore,
        options: RunOptions,
    ) -> None:
        """scope: of the request, for the log. items: the conversation that the response answers."""
        self.response = response
        self.items = items
        self._scope = scope
        self._chat = chat
        self._store = store
        self._options = options
        self._builder = ResponseBuilder(response, options.streams)
        self._is_aborted = self._is_cancelled = False

    async def accepted(self) -> None:
        """Wait until the engine has queued the chat. Raises the engine's refusal."""
        await self._chat.generation.accepted()

    def abort(self) -> None:
        """End the work without a response, because the client has left. After the end it does nothing."""
        self._is_aborted = True
        self._chat.generation.abort()

    def cancel(self) -> None:
        """End the work with the status cancelled. After the end it does nothing."""
        self._is_cancelled = True
        self._chat.generation.abort()

    def log_fields(self) -> dict[str, Any]:
        """Return the fields of the access log."""
        return {"response_id": self.response.id, **self._chat.generation.log_fields()}

    async def whole(self) -> Response:
        """Return the response, when it has ended. Raises the error that ended the chat."""
        finish_reason = "stop"
        if self._options.num_logprobs is None:
            (choice,) = await self._chat.collect()
            self._builder.add(_deltas(choice))
            finish_reason = choice.finish_reason
        else:  # piece by piece, so that the tokens of texts are told from those of reasoning and calls
            async for parsed in self._chat.updates():
                self._builder.add(parsed.deltas, self._logprobs(parsed.update))
                finish_reason = parsed.finish_reason or finish_reason
        self._builder.finish(finish_reason, self._chat.usage())
        self._keep()
        return self.response

    async def batches(self) -> AsyncIterator[list[bytes]]:
        """Yield the events as they come. An error is the last of them."""
        finish_reason = "stop"
        yield self._builder.start()
        try:
            async for parsed in self._chat.updates():
                begun = self._builder.begin_work()
                added = self._builder.add(parsed.deltas, self._logprobs(parsed.update))
                finish_reason = parsed.finish_reason or finish_reason
                if begun or added:
                    yield begun + added
            last = self._builder.finish(finish_reason, self._chat.usage())
        except Exception as error:
            if self._is_aborted:
                return
            last = self._builder.cancel() if self._is_cancelled else self._fail(error)
        self._keep()
        yield last

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the events as they come, for a stream."""
        async for batch in self.batches():
            yield b"".join(batch)

    def _fail(self, error: Exception) -> list[bytes]:
        found = to_api_error(error)
        log_error(self._scope, found, error)
        return self._builder.fail(found.detail.message)

    def _keep(self) -> None:
        if self._options.stores_at_end:
            self._store.add(StoredResponse.of(self.response, self.items))

    def _logprobs(self, update: ChoiceUpdate) -> list[ChatLogprob]:
        count = self._options.num_logprobs
        if count is None:
            return []
        return chat_logprobs(self._chat.model.texts, update.logprobs or (), count).content


def _deltas(choice: ParsedChoice) -> list[OutputDelta]:
    """Return a whole choice as deltas."""
    deltas: list[OutputDelta] = [] if choice.reasoning is None else [ReasoningDelta(choice.reasoning)]
    if choice.content is not None:
        deltas.append(ContentDelta(choice.content))
    for index, call in enumerate(choice.tool_calls):
        deltas += [ToolCallStart(index, call.id, call.name), ToolCallArguments(index, call.arguments)]
    return deltas
