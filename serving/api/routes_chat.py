"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncIterator

from litestar import Request, post
from litestar.types import ASGIApp
from msgspec import UNSET

from dispec.engine.errors import InvalidField
from dispec.serving.api.context import ServedModel, context_of
from dispec.serving.api.generation import Generation, StreamUsage
from dispec.serving.api.logprobs import chat_logprobs, prompt_logprobs
from dispec.serving.api.openapi import describe
from dispec.serving.api.protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Delta,
)
from dispec.serving.api.responses import EventStream, JsonResponse, abort_on_disconnect, event
from dispec.serving.api.sampling import sampling_params
from dispec.serving.client.request_stream import ChoiceUpdate


@post("/v1/chat/completions", status_code=200, **describe(ChatRequest, ChatCompletion, streams=True, tag="Generation"))
async def chat_completions(request: Request) -> ASGIApp:
    """Answer a conversation in the model's own chat template."""
    context = context_of(request)
    model = context.open_model()
    body = await context.body(request, ChatRequest)
    model.check_name(body.model)
    if not body.messages:
        raise InvalidField("messages", "messages is empty: there is nothing to answer")
    prompt = await model.prompts.of_chat(body)
    params = sampling_params(body, model.defaults, len(prompt.token_ids), model.info.max_model_len)
    params = await model.prompts.tokenize_bad_words(params)
    generation = Generation(context, request, body, [prompt], params)
    responses = _Responses(model, body, generation)
    if body.stream:
        return EventStream(generation, responses.events(), context.settings.keep_alive_seconds)
    updates = await abort_on_disconnect(request.scope, request.receive, generation, generation.collect())
    return JsonResponse(responses.whole(updates))


class _Responses:
    """Makes the response or the chunks of one generation."""

    def __init__(self, model: ServedModel, body: ChatRequest, generation: Generation) -> None:
        self._body = body
        self._generation = generation
        self._texts = model.texts
        self._header = (f"chatcmpl-{generation.request_id}", int(time.time()), model.name)

    def whole(self, updates: list[ChoiceUpdate]) -> ChatCompletion:
        body, generation = self._body, self._generation
        choices = [
            ChatChoice(
                index,
                ChatMessage(update.text),
                self._logprobs(update),
                update.finish_reason or "stop",
                update.stop_reason,
                update.token_ids if body.return_token_ids else UNSET,
            )
            for index, update in enumerate(updates)
        ]
        response = ChatCompletion(*self._header, choices=choices, usage=generation.usage())
        if body.return_token_ids:
            response.prompt_token_ids = generation.prompts[0].token_ids
        if body.prompt_logprobs is not None:
            entries = updates[0].prompt_logprobs or []
            response.prompt_logprobs = prompt_logprobs(self._texts, entries, body.prompt_logprobs)
        if generation.transfer.response:
            response.kv_transfer_params = generation.transfer.response
        return response

    async def events(self) -> AsyncIterator[bytes]:
        body, generation = self._body, self._generation
        usage = StreamUsage(body.stream_options, generation.usage)
        has_all = bool(body.return_token_ids) or bool(body.logprobs)
        roles: bytes | None = self._roles(usage)
        async for index, update in generation.updates():
            data = b""
            if roles is not None:
                data, roles = roles, None
            # A token that completes no text has no chunk.
            if update.text or update.finish_reason is not None or has_all:
                choice = ChatChunkChoice(
                    index,
                    Delta(content=update.text),
                    self._logprobs(update),
                    update.finish_reason,
                    UNSET if update.stop_reason is None else update.stop_reason,
                    update.token_ids if body.return_token_ids else UNSET,
                )
                data += event(ChatChunk(*self._header, choices=[choice], usage=usage.of_chunk()))
            if data:
                yield data
        if usage.at_end:
            yield event(ChatChunk(*self._header, choices=[], usage=generation.usage()))

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
