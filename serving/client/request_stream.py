"""A request under way in the front: its updates, in the event loop, until it ends."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.sequence import FinishReason
from dispec.engine.transfer.interface import RemoteBlocks
from dispec.serving.client.engine_errors import EngineDied, EngineFailed, Overloaded, RequestRefused, RequestTimedOut
from dispec.serving.client.request_text import ChoiceUpdate, RequestText, merged
from dispec.serving.client.slo import Slo

RequestError = EngineFailed | EngineDied | RequestTimedOut | RequestRefused | Overloaded


class GenerationRequest(msgspec.Struct):
    """What to generate. `params` may hold texts (stop, bad_words); timeout: seconds for the whole request.

    publish_as, pull: as in `messages.Submit`. is_continued: another engine goes on after the first tokens.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    timeout: float | None = None
    slo: Slo | None = None
    publish_as: str | None = None
    pull: RemoteBlocks | None = None
    is_continued: bool = False


class FirstToken(NamedTuple):
    """What a request's first token tells. seconds: since the request came."""

    prompt_tokens: int
    cached_tokens: int
    seconds: float


class RequestSummary(NamedTuple):
    """A request that has ended. Times as in `RequestTiming`.

    gaps: between each token and the one before it of the same choice, in seconds.
    error: why it failed, else None; finish_reasons: of its choices in order, "error" or "abort" where unfinished.
    """

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    finish_reasons: tuple[FinishReason, ...]
    arrival: float
    started: float | None
    first_token: float | None
    finished: float
    gaps: list[float]
    error: str | None
    slo: Slo | None = None

    @property
    def met_slo(self) -> bool | None:
        """Whether it kept what its class was promised; None without a class, or if its client gave it up."""
        if self.slo is None or "abort" in self.finish_reasons:
            return None
        first = None if self.first_token is None or self.error is not None else self.first_token - self.arrival
        return self.slo.is_met(first, self.gaps)


@dataclass(slots=True)
class RequestTiming:
    """When what happened, in seconds of `time.perf_counter`; None while it has not.

    started: first scheduled. Queue, prefill and decode add up to the total, whatever the request came to.
    """

    arrival: float
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def queue(self) -> float:
        return self._until(self.started) - self.arrival

    @property
    def prefill(self) -> float:
        return self._until(self.first_token) - self._until(self.started)

    @property
    def decode(self) -> float:
        return self._until(self.finished) - self._until(self.first_token)

    @property
    def total(self) -> float:
        return self._until(self.finished) - self.arrival

    def _until(self, moment: float | None) -> float:
        """The moment, or where it did not come the end of the request, or where that did not come either now."""
        return next((time_ for time_ in (moment, self.finished) if time_ is not None), time.perf_counter())


class RequestStream(AsyncIterator[ChoiceUpdate]):
    """The updates of a request, for one reader. It ends after the last choice has, or raises what ended the request:
    EngineFailed, EngineDied, RequestTimedOut, RequestRefused, or Overloaded if it waited past its time.

    Whoever stops reading before the end must `abort`. Everything here but `text` belongs to the event loop's thread.
    """

    def __init__(
        self, key: str, request: GenerationRequest, text: RequestText, on_abort: Callable[["RequestStream"], None]
    ) -> None:
        self.key = key  # ours and unique, whatever clients choose as ids
        self.request = request
        self.text = text
        self.timing = RequestTiming(arrival=time.perf_counter())
        self.finish_reasons: list[FinishReason | None] = [None] * request.params.n
        self.error: RequestError | None = None
        self.is_accepted = False
        self._on_abort = on_abort
        self._unread: dict[int, list[ChoiceUpdate]] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._waits_for_end = False

    @property
    def has_ended(self) -> bool:
        return self.timing.finished is not None

    @property
    def num_open(self) -> int:
        """Choices that have not ended."""
        return 0 if self.has_ended else self.finish_reasons.count(None)

    def abort(self) -> None:
        """End what has not ended, within one step of the engine. Doing it twice, or after the end, does nothing."""
        if not self.has_ended:
            self._on_abort(self)

    async def accepted(self) -> None:
        """Wait until the engine has taken the request into its queue. Raises what ended the request before it did,
        RequestRefused above all, so that an answer's status can be chosen before its first token is there."""
        while not self.is_accepted and not self.has_ended:
            await self._wait()
        if self.error is not None and not self.is_accepted:
            raise self.error

    async def wait(self) -> None:
        """Wait for the end without being woken by each token; reading then gives one update for each choice."""
        self._waits_for_end = True
        while not self.has_ended:
            await self._wait()

    async def __anext__(self) -> ChoiceUpdate:
        self._waits_for_end = False
        while True:
            if self._unread:
                index = next(iter(self._unread))
                return merged(self._unread.pop(index))
            if self.error is not None:
                raise self.error
            if self.has_ended:
                raise StopAsyncIteration
            await self._wait()

    # What the client does to it

    def accept(self) -> None:
        self.is_accepted = True
        self._wake()

    def take(self, update: ChoiceUpdate, now: float) -> None:
        """An update that the engine gave at `now`."""
        if self.timing.first_token is None:
            self.timing.first_token = now
        self._unread.setdefault(update.index, []).append(update)
        if update.finish_reason is not None:
            self.finish_reasons[update.index] = update.finish_reason
            if None not in self.finish_reasons:
                self.timing.finished = now
        if self.has_ended or not self._waits_for_end:
            self._wake()

    def end(self, reason: FinishReason, error: RequestError | None = None) -> None:
        """End whatever is open, for a reason that is not the engine's own."""
        for index, known in enumerate(self.finish_reasons):
            if known is None:
                self.finish_reasons[index] = reason
                if error is None:
                    self._unread.setdefault(index, []).append(ChoiceUpdate(index, "", [], None, reason))
        self.error = error
        self.timing.finished = time.perf_counter()
        self._wake()

    def first_token(self) -> FirstToken:
        """Once there is one."""
        assert self.timing.first_token is not None
        seconds = self.timing.first_token - self.timing.arrival
        return FirstToken(len(self.request.prompt_token_ids), self.text.num_cached_tokens, seconds)

    def summary(self) -> RequestSummary:
        timing = self.timing
        assert timing.finished is not None
        return RequestSummary(
            request_id=self.request.request_id,
            prompt_tokens=len(self.request.prompt_token_ids),
            cached_tokens=self.text.num_cached_tokens,
            output_tokens=self.text.num_tokens,
            finish_reasons=tuple(reason or "error" for reason in self.finish_reasons),
            arrival=timing.arrival,
            started=timing.started,
            first_token=timing.first_token,
            finished=timing.finished,
            gaps=self.text.gaps,
            error=None if self.error is None else str(self.error),
            slo=self.request.slo,
        )

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
