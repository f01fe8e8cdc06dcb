"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncIterator

from litestar import Request, post
from litestar.types import ASGIApp
from msgspec import UNSET

from dispec.serving.api.call import Call
from dispec.serving.api.logprobs import chat_logprobs, prompt_logprobs
from dispec.serving.api.openapi import describe
from dispec.serving.api.protocol import ChatRequest
from dispec.serving.api.protocol_answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Delta,
)
from dispec.serving.api.protocol_sampling import sampling_params
from dispec.serving.api.requests import begin, stream_usage
from dispec.serving.api.service import ServedModel, service_of
from dispec.serving.api.streaming import EventStream, JsonAnswer, event, unless_client_leaves
from dispec.serving.client.request_stream import ChoiceUpdate
from dispec.serving.http.errors import ApiError


@post("/v1/chat/completions", status_code=200, **describe(ChatRequest, ChatCompletion, streams=True, tag="Generation"))
async def chat_completions(request: Request) -> ASGIApp:
    """Answer a conversation in the model's own chat template."""
    service = service_of(request)
    model = service.open_model()
    body = await service.body(request, ChatRequest)
    model.check_name(body.model)
    if not body.messages:
        raise ApiError(400, "messages is empty: there is nothing to answer", param="messages")
    prompt = await model.prompts.of_chat(body)
    params = sampling_params(body, model.defaults, model.room(len(prompt.token_ids)), model.info.max_model_len)
    params = await model.prompts.without_texts(params)
    call = begin(service, request, body, [prompt], [params])
    answer = _Answer(model, body, call)
    if body.stream:
        return EventStream(call, answer.events(), service.settings.keep_alive_seconds)
    updates = await unless_client_leaves(request.scope, request.receive, call, call.finished())
    return JsonAnswer(answer.whole(updates))


class _Answer:
    """Makes the bodies of one call."""

    def __init__(self, model: ServedModel, body: ChatRequest, call: Call) -> None:
        self._body = body
        self._call = call
        self._plain_texts = model.texts
        self._texts = model.texts.by_id if body.return_tokens_as_token_ids else model.texts
        self._head = (f"chatcmpl-{call.request_id}", int(time.time()), model.name)

    def whole(self, updates: list[ChoiceUpdate]) -> ChatCompletion:
        body, call = self._body, self._call
        of_prompt = updates[0].prompt_logprobs
        return ChatCompletion(
            *self._head,
            choices=[
                ChatChoice(
                    index,
                    ChatMessage(update.text),
                    self._logprobs(update),
                    update.finish_reason or "stop",
                    update.stop_reason,
                    update.token_ids if body.return_token_ids else UNSET,
                )
                for index, update in enumerate(updates)
            ],
            usage=call.usage(),
            prompt_token_ids=call.prompts[0].token_ids if body.return_token_ids else UNSET,
            prompt_logprobs=None
            if body.prompt_logprobs is None
            else prompt_logprobs(self._plain_texts, of_prompt or [], body.prompt_logprobs),
            kv_transfer_params=call.transfer.answer or UNSET,
        )

    async def events(self) -> AsyncIterator[bytes]:
        body, call, head = self._body, self._call, self._head
        at_end, always = stream_usage(body)
        returns_ids, has_logprobs = bool(body.return_token_ids), bool(body.logprobs)
        opening: bytes | None = self._opening(at_end, always)
        async for index, update in call.updates():
            data = b""
            if opening is not None:
                data, opening = opening, None
            # A token may make no text certain, and then there is nothing to say about it.
            if update.text or update.finish_reason is not None or has_logprobs or returns_ids:
                choice = ChatChunkChoice(
                    index,
                    Delta(content=update.text),
                    self._logprobs(update) if has_logprobs else None,
                    update.finish_reason,
                    UNSET if update.stop_reason is None else update.stop_reason,
                    update.token_ids if returns_ids else UNSET,
                )
                usage = call.usage() if always else None if at_end else UNSET
                data += event(ChatChunk(*head, choices=[choice], usage=usage))
            if data:
                yield data
        if at_end:
            yield event(ChatChunk(*head, choices=[], usage=call.usage()))

    def _opening(self, at_end: bool, always: bool) -> bytes:
        """The role of each choice."""
        call, body = self._call, self._body
        usage = call.usage() if always else None if at_end else UNSET
        chunks = [
            ChatChunk(*self._head, choices=[ChatChunkChoice(index, Delta(role="assistant", content=""))], usage=usage)
            for index in range(call.num_choices)
        ]
        if body.return_token_ids:
            chunks[0].prompt_token_ids = call.prompts[0].token_ids
        return b"".join(event(chunk) for chunk in chunks)

    def _logprobs(self, update: ChoiceUpdate) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._texts, update.logprobs or (), self._body.top_logprobs or 0)
