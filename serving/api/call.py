"""One API call under way: its prompts' streams in the engine, read as one, and the tokens that it used."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from msgspec import UNSET

from dispec.engine.sampling_params import SamplingParams
from dispec.serving.api.kv_transfer import Transfer
from dispec.serving.api.prompts import Prompt
from dispec.serving.api.protocol_answers import CompletionTokensDetails, PromptTokensDetails, Usage
from dispec.serving.client.engine_client import EngineClient
from dispec.serving.client.request_stream import ChoiceUpdate, GenerationRequest, RequestStream
from dispec.serving.client.slo import Slo
from dispec.serving.http.errors import ApiError


class Call:
    """Begins at once. Whoever makes one must `abort` it in the end, which does nothing if it is over.

    Choices are numbered through: those of the first prompt, then those of the second. Raises Overloaded, NotReady or
    InvalidRequest or ContextOverflow, and then nothing is under way.
    """

    def __init__(
        self,
        client: EngineClient,
        request_id: str,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        timeout: float | None = None,
        slo: Slo | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompts = prompts
        self.num_choices = params[0].n
        self.transfer = transfer or Transfer()
        self.cached_tokens = 0
        self.right_guesses = self.wrong_guesses = 0
        self.completion_tokens = 0
        self.streams: list[RequestStream] = []
        try:
            for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
                name = request_id if len(prompts) == 1 else f"{request_id}-{index}"
                request = GenerationRequest(
                    name,
                    prompt.token_ids,
                    param,
                    priority,
                    cache_salt,
                    timeout,
                    slo,
                    self.transfer.publish_as,
                    self.transfer.pull,
                )
                self.streams.append(client.submit(request))
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """End what has not ended. Doing it twice does nothing."""
        for stream in self.streams:
            stream.abort()

    async def accepted(self) -> None:
        """Wait until the engine has taken it. Raises what it says instead."""
        for stream in self.streams:
            await stream.accepted()

    async def updates(self) -> AsyncIterator[tuple[int, ChoiceUpdate]]:
        """Each update with the number of its choice, as they come."""
        if len(self.streams) == 1:
            async for update in self.streams[0]:
                yield update.index, self._count(update)
            return
        queue: asyncio.Queue[tuple[int, ChoiceUpdate] | BaseException | None] = asyncio.Queue(maxsize=64)
        tasks = [asyncio.create_task(_forward(stream, index, queue)) for index, stream in enumerate(self.streams)]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item[0] * self.num_choices + item[1].index, self._count(item[1])
        finally:
            for task in tasks:
                task.cancel()

    async def finished(self) -> list[ChoiceUpdate]:
        """All that there is to know about each choice, once it is over."""
        for stream in self.streams:
            await stream.wait()
        found: list[ChoiceUpdate] = []
        for stream in self.streams:
            ends = {update.index: self._count(update) async for update in stream}
            found += [ends[index] for index in range(self.num_choices)]
        return found

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def usage(self) -> Usage:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        guessed = CompletionTokensDetails(self.right_guesses, self.wrong_guesses)
        return Usage(
            prompt,
            completion,
            prompt + completion,
            PromptTokensDetails(self.cached_tokens),
            guessed if self.right_guesses or self.wrong_guesses else UNSET,
        )

    def log_fields(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
        }

    def _count(self, update: ChoiceUpdate) -> ChoiceUpdate:
        if update.finish_reason == "abort":
            raise ApiError(503, "the request was ended before it was done", code="aborted", retry_after=5)
        self.completion_tokens += len(update.token_ids)
        self.cached_tokens += update.num_cached_tokens or 0
        self.right_guesses += update.num_accepted
        self.wrong_guesses += update.num_rejected
        return update


async def _forward(stream: RequestStream, index: int, queue: asyncio.Queue) -> None:
    try:
        async for update in stream:
            await queue.put((index, update))
        await queue.put(None)
    except Exception as error:
        await queue.put(error)
