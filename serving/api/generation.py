"""One API call in the engine: the streams of its prompts, read as one, and the tokens that it used."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from litestar import Request
from msgspec import UNSET, UnsetType

from dispec.engine.errors import InvalidField
from dispec.engine.request_checks import check_priority
from dispec.engine.sampling_params import SamplingParams
from dispec.serving.api.context import ApiContext
from dispec.serving.api.kv_transfer import read_transfer
from dispec.serving.api.prompts import Prompt
from dispec.serving.api.protocol import SamplingRequest, StreamOptions
from dispec.serving.api.response_bodies import CompletionTokensDetails, PromptTokensDetails, Usage
from dispec.serving.client.errors import RETRY_SECONDS, Unavailable
from dispec.serving.client.request_stream import ChoiceUpdate, GenerationRequest, RequestStream
from dispec.serving.http.errors import ApiError
from dispec.serving.http.middleware import MAX_REQUEST_ID, REQUEST_ID

_MAX_UNREAD = 64  # updates of all streams that wait for a slow reader


class Generation:
    """Starts at once, and must be aborted in the end. Choices are numbered through all prompts."""

    def __init__(
        self,
        context: ApiContext,
        request: Request,
        body: SamplingRequest,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        kept_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Submit the prompts of a checked request to the engine. kept_token_ids: special tokens that stay in the text.

        Raises InvalidField, ContextOverflow, InvalidRequest, Overloaded or NotReady, and leaves nothing in the engine.
        """
        self.prompts = prompts
        self.num_choices = params.n
        self.cached_tokens = 0
        self.accepted_tokens = self.rejected_tokens = 0  # of drafts
        self.completion_tokens = 0
        self._streams: list[RequestStream] = []
        settings, info = context.settings, context.open_model().info
        if len(prompts) > settings.max_queued_requests:
            said = f"prompt holds {len(prompts)} prompts, must be at most {settings.max_queued_requests}"
            raise InvalidField("prompt", said)
        check_priority(body.priority or 0)
        try:
            slo = settings.find_slo(body.slo)
        except ValueError as error:
            raise InvalidField("slo", str(error)) from None
        self.request_id = _request_id(request, body.request_id)
        self.transfer = read_transfer(body.kv_transfer_params, info, settings.role, len(prompts))
        try:
            for index, prompt in enumerate(prompts):
                submitted = GenerationRequest(
                    self.request_id if len(prompts) == 1 else f"{self.request_id}-{index}",
                    prompt.token_ids,
                    params,
                    body.priority or 0,
                    body.cache_salt,
                    settings.request_timeout,
                    slo,
                    self.transfer.publish_as,
                    self.transfer.pull,
                    kept_token_ids=kept_token_ids,
                )
                self._streams.append(context.client.submit(submitted))
        except BaseException as error:
            if isinstance(error, Unavailable):
                context.client.report_refusal()
            self.abort()
            raise

    def abort(self) -> None:
        """End the choices that have not ended. Aborting twice does nothing."""
        for stream in self._streams:
            stream.abort()

    async def accepted(self) -> None:
        """Wait until the engine has queued all prompts. Raises the engine's refusal."""
        for stream in self._streams:
            await stream.accepted()

    async def updates(self) -> AsyncIterator[tuple[int, ChoiceUpdate]]:
        """Yield each update with the number of its choice, as they come."""
        if len(self._streams) == 1:
            async for update in self._streams[0]:
                yield update.index, self._count(update)
            return
        queue: asyncio.Queue[tuple[int, ChoiceUpdate] | Exception | None] = asyncio.Queue(_MAX_UNREAD)
        tasks = [asyncio.create_task(_forward(stream, index, queue)) for index, stream in enumerate(self._streams)]
        try:
            num_open = len(tasks)
            while num_open:
                item = await queue.get()
                if item is None:
                    num_open -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item[0] * self.num_choices + item[1].index, self._count(item[1])
        finally:
            for task in tasks:
                task.cancel()

    async def collect(self) -> list[ChoiceUpdate]:
        """Return all of each choice as one update, when the last has ended."""
        for stream in self._streams:
            await stream.wait()
        found: list[ChoiceUpdate] = []
        for stream in self._streams:
            choices = {update.index: self._count(update) async for update in stream}
            found += [choices[index] for index in range(self.num_choices)]
        return found

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def usage(self) -> Usage:
        """Return the tokens used so far."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        drafts = CompletionTokensDetails(self.accepted_tokens, self.rejected_tokens)
        return Usage(
            prompt,
            completion,
            prompt + completion,
            PromptTokensDetails(self.cached_tokens),
            drafts if self.accepted_tokens or self.rejected_tokens else UNSET,
        )

    def log_fields(self) -> dict[str, Any]:
        """Return the fields of the access log."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
        }

    def _count(self, update: ChoiceUpdate) -> ChoiceUpdate:
        if update.finish_reason == "abort":
            raise ApiError(503, "the request was ended before it was done", code="aborted", retry_after=RETRY_SECONDS)
        self.completion_tokens += len(update.token_ids)
        self.cached_tokens += update.num_cached_tokens or 0
        self.accepted_tokens += update.num_accepted
        self.rejected_tokens += update.num_rejected
        return update


class StreamUsage:
    """Decides which chunks of a stream carry the usage: each, an additional last one, or none."""

    def __init__(self, options: StreamOptions | None, usage: Callable[[], Usage]) -> None:
        self.at_end = options is not None and bool(options.include_usage)
        self._is_continuous = options is not None and self.at_end and bool(options.continuous_usage_stats)
        self._usage = usage

    def of_chunk(self) -> Usage | UnsetType | None:
        """Return the usage for a chunk with a choice."""
        if self._is_continuous:
            return self._usage()
        return None if self.at_end else UNSET


def _request_id(request: Request, given: str | None) -> str:
    """Return the id of the request. The body's replaces the header's."""
    if given:
        if not REQUEST_ID.fullmatch(given.encode()):
            limits = f"must be at most {MAX_REQUEST_ID} printable ASCII characters"
            raise InvalidField("request_id", f"request_id is {given!r:.50}, {limits}")
        request.scope["state"]["request_id"] = given
    return request.scope["state"]["request_id"]


async def _forward(stream: RequestStream, index: int, queue: asyncio.Queue) -> None:
    try:
        async for update in stream:
            await queue.put((index, update))
        await queue.put(None)
    except Exception as error:
        await queue.put(error)
