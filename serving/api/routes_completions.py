"""POST /v1/completions, the older API, which evaluation harnesses speak; and POST /generate, the short form."""

import time
from collections.abc import AsyncIterator

from litestar import Request, post
from litestar.types import ASGIApp
from msgspec import UNSET

from dispec.serving.api.call import Call
from dispec.serving.api.logprobs import CompletionLogprobsMaker, joined, prompt_logprobs
from dispec.serving.api.openapi import describe
from dispec.serving.api.prompts import Cut
from dispec.serving.api.protocol import CompletionRequest, GenerateRequest
from dispec.serving.api.protocol_answers import Completion, CompletionChoice, CompletionLogprobs, GenerateAnswer, Usage
from dispec.serving.api.protocol_sampling import check_max_tokens, sampling_params
from dispec.serving.api.requests import begin, stream_usage
from dispec.serving.api.service import ServedModel, service_of
from dispec.serving.api.streaming import EventStream, JsonAnswer, event, unless_client_leaves
from dispec.serving.client.request_stream import ChoiceUpdate


@post("/v1/completions", status_code=200, **describe(CompletionRequest, Completion, streams=True, tag="Generation"))
async def completions(request: Request) -> ASGIApp:
    """Continue a prompt, or each of several."""
    service = service_of(request)
    model = service.open_model()
    body = await service.body(request, CompletionRequest)
    model.check_name(body.model)
    prompts = await model.prompts.of_texts(body.prompt, body.add_special_tokens, Cut.of(body))
    # They differ in how many tokens fit after them, which matters only where max_tokens is left out.
    room = min(model.room(len(prompt.token_ids)) for prompt in prompts)
    params = sampling_params(body, model.defaults, room, model.info.max_model_len)
    params = await model.prompts.without_texts(params)
    call = begin(service, request, body, prompts, [params] * len(prompts))
    answer = _Answer(model, body, call)
    if body.stream:
        return EventStream(call, answer.events(), service.settings.keep_alive_seconds)
    updates = await unless_client_leaves(request.scope, request.receive, call, call.finished())
    return JsonAnswer(answer.whole(updates))


@post("/generate", status_code=200, **describe(GenerateRequest, GenerateAnswer, tag="Generation"))
async def generate(request: Request) -> ASGIApp:
    """Continue a prompt: no roles, no choices."""
    service = service_of(request)
    model = service.open_model()
    short = await service.body(request, GenerateRequest)
    model.check_name(short.model)
    body = CompletionRequest(
        prompt=short.prompt,  # type: ignore[arg-type]
        max_tokens=short.max_new_tokens,
        temperature=short.temperature,
        priority=short.priority,
    )
    prompts = await model.prompts.of_texts(body.prompt)
    room = model.room(len(prompts[0].token_ids))
    if body.max_tokens is None:
        body.max_tokens = room
    check_max_tokens("max_new_tokens", body.max_tokens, model.info.max_model_len)
    params = sampling_params(body, model.defaults, room, model.info.max_model_len)
    call = begin(service, request, body, prompts[:1], [params])
    (update,) = await unless_client_leaves(request.scope, request.receive, call, call.finished())
    return JsonAnswer(GenerateAnswer(update.text, len(update.token_ids)))


class _Answer:
    """Makes the bodies of one call."""

    def __init__(self, model: ServedModel, body: CompletionRequest, call: Call) -> None:
        self._model = model
        self._body = body
        self._call = call
        self._only_prompt = body.max_tokens == 0
        self._head = (f"cmpl-{call.request_id}", int(time.time()), model.name)
        self._prompt_texts: dict[int, str] = {}
        skips = body.skip_special_tokens is not False
        texts = model.texts.by_id if body.return_tokens_as_token_ids else model.texts
        self._makers = [
            CompletionLogprobsMaker(texts, body.logprobs or 0, skips)
            for _ in range(len(call.prompts) * call.num_choices)
        ]

    def whole(self, updates: list[ChoiceUpdate]) -> Completion:
        # The first choice of a prompt brings what there is to know about the prompt.
        firsts = [updates[index - index % self._call.num_choices] for index in range(len(updates))]
        choices = [
            self._choice(index, update, first)
            for index, (update, first) in enumerate(zip(updates, firsts, strict=True))
        ]
        for choice, update, first in zip(choices, updates, firsts, strict=True):
            choice.stop_reason = update.stop_reason
            count, of_prompt = self._body.prompt_logprobs, first.prompt_logprobs or []
            choice.prompt_logprobs = None if count is None else prompt_logprobs(self._model.texts, of_prompt, count)
        transfer = self._call.transfer.answer or UNSET
        return Completion(*self._head, choices=choices, usage=self._usage(), kv_transfer_params=transfer)

    async def events(self) -> AsyncIterator[bytes]:
        call, head = self._call, self._head
        at_end, always = stream_usage(self._body)
        says_all = bool(self._body.return_token_ids) or self._body.logprobs is not None
        firsts: dict[int, ChoiceUpdate] = {}
        begun: set[int] = set()
        async for index, update in call.updates():
            first = None
            if index not in begun:
                begun.add(index)
                first = firsts.setdefault(index // call.num_choices, update)
            choice = self._choice(index, update, first)
            # A token may make no text certain, and then there is nothing to say about it.
            if choice.text or choice.finish_reason is not None or says_all:
                usage = self._usage() if always else None if at_end else UNSET
                yield event(Completion(*head, choices=[choice], usage=usage))
        if at_end:
            yield event(Completion(*head, choices=[], usage=self._usage()))

    def _choice(self, index: int, update: ChoiceUpdate, first: ChoiceUpdate | None) -> CompletionChoice:
        """A choice, or a piece of it. `first`, at its beginning, is the first update of its prompt."""
        body, maker = self._body, self._makers[index]
        text, token_ids, entries = update.text, update.token_ids, update.logprobs or []
        if self._only_prompt:
            text, token_ids, entries = "", [], []
        logprobs: CompletionLogprobs | None = None
        if first is not None and body.echo:
            prompt = self._call.prompts[index // self._call.num_choices]
            prompt_text = self._text_of(index // self._call.num_choices)
            if body.logprobs is not None:
                logprobs = maker.of_prompt(prompt.token_ids, first.prompt_logprobs or [], prompt_text)
            text = prompt_text + text
        if body.logprobs is not None:
            of_output = maker.of_output(entries, update.text)
            logprobs = of_output if logprobs is None else joined(logprobs, of_output)
        choice = CompletionChoice(index, text, logprobs, update.finish_reason)
        if update.stop_reason is not None:
            choice.stop_reason = update.stop_reason
        if body.return_token_ids:
            choice.token_ids = token_ids
            if first is not None:
                choice.prompt_token_ids = self._call.prompts[index // self._call.num_choices].token_ids
        return choice

    def _text_of(self, number: int) -> str:
        """The text of a prompt that is echoed."""
        if number not in self._prompt_texts:
            prompt = self._call.prompts[number]
            text = prompt.text
            if text is None:
                text = self._model.prompts.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
            self._prompt_texts[number] = text
        return self._prompt_texts[number]

    def _usage(self) -> Usage:
        usage = self._call.usage()
        if self._only_prompt:
            usage.total_tokens -= usage.completion_tokens
            usage.completion_tokens = 0
        return usage
