"""POST /v1/completions, which evaluation harnesses use; and POST /generate, its short form."""

import time
from collections.abc import AsyncIterator

from litestar import Request, post
from litestar.types import ASGIApp
from msgspec import UNSET

from dispec.serving.api.context import ServedModel, context_of
from dispec.serving.api.generation import Generation, StreamUsage
from dispec.serving.api.http_responses import EventStream, JsonResponse, abort_on_disconnect, event
from dispec.serving.api.logprobs import CompletionLogprobsBuilder, prompt_logprobs
from dispec.serving.api.openapi import describe
from dispec.serving.api.prompts import Truncation
from dispec.serving.api.protocol import CompletionRequest, GenerateRequest
from dispec.serving.api.response_bodies import Completion, CompletionChoice, CompletionLogprobs, GenerateResponse, Usage
from dispec.serving.api.sampling import check_max_tokens, sampling_params
from dispec.serving.client.request_stream import ChoiceUpdate


@post("/v1/completions", status_code=200, **describe(CompletionRequest, Completion, streams=True, tag="Generation"))
async def completions(request: Request) -> ASGIApp:
    """Continue a prompt, or each of several."""
    context = context_of(request)
    model = context.open_model()
    body = await context.body(request, CompletionRequest)
    model.check_name(body.model)
    prompts = await model.prompts.of_completion(body.prompt, body.add_special_tokens, Truncation.requested(body))
    longest = max(len(prompt.token_ids) for prompt in prompts)
    params = sampling_params(body, model.defaults, longest, model.info.max_model_len)
    params = await model.prompts.tokenize_bad_words(params)
    generation = Generation(context, request, body, prompts, params)
    responses = _Responses(model, body, generation)
    if body.stream:
        return EventStream(generation, responses.events(), context.settings.keep_alive_seconds)
    updates = await abort_on_disconnect(request.scope, request.receive, generation, generation.collect())
    return JsonResponse(responses.whole(updates))


@post("/generate", status_code=200, **describe(GenerateRequest, GenerateResponse, tag="Generation"))
async def generate(request: Request) -> ASGIApp:
    """Continue a prompt: no roles, no choices."""
    context = context_of(request)
    model = context.open_model()
    short = await context.body(request, GenerateRequest)
    model.check_name(short.model)
    (prompt,) = await model.prompts.of_completion(short.prompt)  # type: ignore[arg-type]
    max_model_len = model.info.max_model_len
    room = max_model_len - len(prompt.token_ids)
    max_tokens = room if short.max_new_tokens is None else short.max_new_tokens
    check_max_tokens("max_new_tokens", max_tokens, max_model_len)
    body = CompletionRequest(
        prompt=prompt.token_ids,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        temperature=short.temperature,
        priority=short.priority,
    )
    params = sampling_params(body, model.defaults, len(prompt.token_ids), max_model_len)
    generation = Generation(context, request, body, [prompt], params)
    (update,) = await abort_on_disconnect(request.scope, request.receive, generation, generation.collect())
    return JsonResponse(GenerateResponse(update.text, len(update.token_ids)))


class _Responses:
    """Makes the response or the chunks of one generation."""

    def __init__(self, model: ServedModel, body: CompletionRequest, generation: Generation) -> None:
        self._model = model
        self._body = body
        self._generation = generation
        self._is_prompt_only = body.max_tokens == 0
        self._header = (f"cmpl-{generation.request_id}", int(time.time()), model.name)
        self._echoes: dict[int, str] = {}  # texts of prompts by their number
        skips = body.skip_special_tokens is not False
        texts = model.texts.by_id if body.return_tokens_as_token_ids else model.texts
        self._logprobs = [
            CompletionLogprobsBuilder(texts, body.logprobs or 0, skips)
            for _ in range(len(generation.prompts) * generation.num_choices)
        ]

    def whole(self, updates: list[ChoiceUpdate]) -> Completion:
        count = self._body.prompt_logprobs
        choices = []
        for index, update in enumerate(updates):
            first = updates[index - index % self._generation.num_choices]  # has the prompt's log-probabilities
            choice = self._choice(index, update, first)
            choice.stop_reason = update.stop_reason
            choice.prompt_logprobs = (
                None if count is None else prompt_logprobs(self._model.texts, first.prompt_logprobs or [], count)
            )
            choices.append(choice)
        transfer = self._generation.transfer.response or UNSET
        return Completion(*self._header, choices=choices, usage=self._usage(), kv_transfer_params=transfer)

    async def events(self) -> AsyncIterator[bytes]:
        generation = self._generation
        usage = StreamUsage(self._body.stream_options, self._usage)
        has_all = bool(self._body.return_token_ids) or self._body.logprobs is not None
        firsts: dict[int, ChoiceUpdate] = {}
        begun: set[int] = set()
        async for index, update in generation.updates():
            first = None
            if index not in begun:
                begun.add(index)
                first = firsts.setdefault(index // generation.num_choices, update)
            choice = self._choice(index, update, first)
            # A token that completes no text has no chunk.
            if choice.text or choice.finish_reason is not None or has_all:
                yield event(Completion(*self._header, choices=[choice], usage=usage.of_chunk()))
        if usage.at_end:
            yield event(Completion(*self._header, choices=[], usage=self._usage()))

    def _choice(self, index: int, update: ChoiceUpdate, first: ChoiceUpdate | None) -> CompletionChoice:
        """Return a choice, or a piece of it. `first`, at its beginning, is the first update of its prompt."""
        body, builder = self._body, self._logprobs[index]
        number = index // self._generation.num_choices
        prompt_token_ids = self._generation.prompts[number].token_ids
        text, token_ids, entries = update.text, update.token_ids, update.logprobs or []
        if self._is_prompt_only:
            text, token_ids, entries = "", [], []
        logprobs: CompletionLogprobs | None = None
        if first is not None and body.echo:
            echo = self._echo(number)
            text = echo + text
            if body.logprobs is not None:
                logprobs = builder.of_prompt(prompt_token_ids, first.prompt_logprobs or [], echo)
        if body.logprobs is not None:
            logprobs = builder.of_output(entries, update.text, logprobs)
        choice = CompletionChoice(index, text, logprobs, update.finish_reason)
        if update.stop_reason is not None:
            choice.stop_reason = update.stop_reason
        if body.return_token_ids:
            choice.token_ids = token_ids
            if first is not None:
                choice.prompt_token_ids = prompt_token_ids
        return choice

    def _echo(self, number: int) -> str:
        """Return the text of a prompt."""
        if number not in self._echoes:
            prompt = self._generation.prompts[number]
            text = prompt.text
            if text is None:
                text = self._model.prompts.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
            self._echoes[number] = text
        return self._echoes[number]

    def _usage(self) -> Usage:
        usage = self._generation.usage()
        if self._is_prompt_only:
            usage.total_tokens -= usage.completion_tokens
            usage.completion_tokens = 0
        return usage
