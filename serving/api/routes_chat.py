"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncIterator

from litestar import Request, post
from litestar.types import ASGIApp
from msgspec import UNSET

from dispec.serving.api.chat_generation import ChatGeneration, ParsedChoice, ParsedUpdate
from dispec.serving.api.context import context_of
from dispec.serving.api.generation import StreamUsage
from dispec.serving.api.http_responses import EventStream, JsonResponse, abort_on_disconnect, event
from dispec.serving.api.logprobs import chat_logprobs, prompt_logprobs
from dispec.serving.api.openapi import describe
from dispec.serving.api.protocol import ChatRequest
from dispec.serving.api.response_bodies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatToolCall,
    Delta,
    FunctionCall,
    FunctionCallDelta,
    ToolCallDelta,
)
from dispec.serving.chat_output.deltas import ContentDelta, OutputDelta, ReasoningDelta, ToolCallStart
from dispec.serving.client.request_stream import ChoiceUpdate


@post("/v1/chat/completions", status_code=200, **describe(ChatRequest, ChatCompletion, streams=True, tag="Generation"))
async def chat_completions(request: Request) -> ASGIApp:
    """Answer a conversation in the model's own chat template."""
    context = context_of(request)
    context.open_model()
    body = await context.body(request, ChatRequest)
    chat = await ChatGeneration.start(request, body)
    responses = _Responses(body, chat)
    if body.stream:
        return EventStream(chat.generation, responses.events(), context.settings.keep_alive_seconds)
    choices = await abort_on_disconnect(request.scope, request.receive, chat.generation, chat.collect())
    return JsonResponse(responses.whole(choices))


class _Responses:
    """Makes the response or the chunks of one chat."""

    def __init__(self, body: ChatRequest, chat: ChatGeneration) -> None:
        self._body = body
        self._chat = chat
        self._generation = chat.generation
        self._texts = chat.model.texts
        self._header = (f"chatcmpl-{chat.generation.request_id}", int(time.time()), chat.model.name)

    def whole(self, parsed: list[ParsedChoice]) -> ChatCompletion:
        body, generation = self._body, self._generation
        choices = [
            ChatChoice(
                index,
                _message(choice),
                self._logprobs(choice.update),
                choice.finish_reason,
                choice.update.stop_reason,
                choice.update.token_ids if body.return_token_ids else UNSET,
            )
            for index, choice in enumerate(parsed)
        ]
        response = ChatCompletion(*self._header, choices=choices, usage=self._chat.usage())
        if body.return_token_ids:
            response.prompt_token_ids = generation.prompts[0].token_ids
        if body.prompt_logprobs is not None:
            entries = parsed[0].update.prompt_logprobs or []
            response.prompt_logprobs = prompt_logprobs(self._texts, entries, body.prompt_logprobs)
        if generation.transfer.response:
            response.kv_transfer_params = generation.transfer.response
        return response

    async def events(self) -> AsyncIterator[bytes]:
        usage = StreamUsage(self._body.stream_options, self._chat.usage)
        roles: bytes | None = self._roles(usage)
        async for parsed in self._chat.updates():
            data = b""
            if roles is not None:
                data, roles = roles, None
            for choice in self._choices(parsed):
                data += event(ChatChunk(*self._header, choices=[choice], usage=usage.of_chunk()))
            if data:
                yield data
        if usage.at_end:
            yield event(ChatChunk(*self._header, choices=[], usage=self._chat.usage()))

    def _choices(self, parsed: ParsedUpdate) -> list[ChatChunkChoice]:
        """Return the choice of each chunk of an update. The last one has what belongs to its tokens."""
        body, update = self._body, parsed.update
        choices = [ChatChunkChoice(parsed.index, _delta(delta)) for delta in parsed.deltas]
        if not choices:
            # A token that completes no text has no chunk.
            if parsed.finish_reason is None and not body.return_token_ids and not body.logprobs:
                return []
            choices = [ChatChunkChoice(parsed.index, Delta(content=""))]
        last = choices[-1]
        last.logprobs = self._logprobs(update)
        last.finish_reason = parsed.finish_reason
        last.stop_reason = UNSET if update.stop_reason is None else update.stop_reason
        last.token_ids = update.token_ids if body.return_token_ids else UNSET
        return choices

    def _roles(self, usage: StreamUsage) -> bytes:
        """Return the first event of each choice."""
        chunks = [
            ChatChunk(
                *self._header,
                choices=[ChatChunkChoice(index, Delta(role="assistant", content=""))],
                usage=usage.of_chunk(),
            )
            for index in range(self._generation.num_choices)
        ]
        if self._body.return_token_ids:
            chunks[0].prompt_token_ids = self._generation.prompts[0].token_ids
        return b"".join(map(event, chunks))

    def _logprobs(self, update: ChoiceUpdate) -> ChatLogprobs | None:
        body = self._body
        if not body.logprobs:
            return None
        texts = self._texts.by_id if body.return_tokens_as_token_ids else self._texts
        return chat_logprobs(texts, update.logprobs or (), body.top_logprobs or 0)


def _message(choice: ParsedChoice) -> ChatMessage:
    message = ChatMessage(choice.content)
    if choice.reasoning is not None:
        message.reasoning_content = message.reasoning = choice.reasoning
    if choice.tool_calls:
        message.tool_calls = [
            ChatToolCall(call.id, FunctionCall(call.name, call.arguments)) for call in choice.tool_calls
        ]
    return message


def _delta(delta: OutputDelta) -> Delta:
    """Return a delta in OpenAI's form: a call's first has its id and name, the others have pieces of its arguments."""
    if isinstance(delta, ContentDelta):
        return Delta(content=delta.text)
    if isinstance(delta, ReasoningDelta):
        return Delta(reasoning_content=delta.text, reasoning=delta.text)
    if isinstance(delta, ToolCallStart):
        function = FunctionCallDelta(delta.name, "")
        return Delta(tool_calls=[ToolCallDelta(delta.index, delta.id, "function", function)])
    return Delta(tool_calls=[ToolCallDelta(delta.index, function=FunctionCallDelta(arguments=delta.text))])
