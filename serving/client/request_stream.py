"""A request in the server process: what it asks for, its updates until it ends, and its counts."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Self

import msgspec

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.token_output import FinishReason, TokenLogprobs
from dispec.engine.transfer.interface import RemoteBlocks
from dispec.serving.client.errors import EngineDied, EngineFailed, InvalidRequest, Overloaded, RequestTimedOut
from dispec.serving.client.slo import Slo

RequestError = EngineFailed | EngineDied | RequestTimedOut | InvalidRequest | Overloaded


class GenerationRequest(msgspec.Struct):
    """A tokenized request. `params` may hold texts (stop, bad_words). timeout: seconds for the whole request.

    publish_as, pull, is_resumed: as in `messages.Submit`.
    is_continued: another engine continues after the first tokens, so `max_tokens` of this engine does not end the text.
    kept_token_ids: special tokens that stay in the text.
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
    is_resumed: bool = False
    kept_token_ids: frozenset[int] = frozenset()


class ChoiceUpdate(msgspec.Struct, frozen=True):
    """New tokens of one choice, and the text that they complete, which may be empty.

    A slow reader gets several steps as one update. prompt_logprobs (without the first token's) and num_cached_tokens
    come with the first update of choice 0. num_accepted, num_rejected: draft tokens. An aborted choice ends with an
    update without tokens.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int | None = None
    num_accepted: int = 0
    num_rejected: int = 0

    @classmethod
    def merged(cls, updates: Sequence[Self]) -> Self:
        """Return consecutive updates of one choice as one."""
        if len(updates) == 1:
            return updates[0]
        first, last = updates[0], updates[-1]
        logprobs = [entry for update in updates for entry in update.logprobs or ()]
        return cls(
            first.index,
            "".join(update.text for update in updates),
            [token for update in updates for token in update.token_ids],
            logprobs if any(update.logprobs is not None for update in updates) else None,
            last.finish_reason,
            last.stop_reason,
            first.prompt_logprobs,
            first.num_cached_tokens,
            sum(update.num_accepted for update in updates),
            sum(update.num_rejected for update in updates),
        )


@dataclass(slots=True)
class RequestTiming:
    """Times of a request, in seconds of `time.perf_counter`; None for an event that has not come.

    started: first scheduled. Queue, prefill and decode add up to the total, however the request ended.
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

    @property
    def ttft(self) -> float:
        return self._until(self.first_token) - self.arrival

    def _until(self, moment: float | None) -> float:
        """Return the moment; where it did not come, the end of the request; else the current time."""
        return next((time_ for time_ in (moment, self.finished) if time_ is not None), time.perf_counter())


class RequestStream(AsyncIterator[ChoiceUpdate]):
    """The updates of a request, for one reader. It ends after the last choice, or raises the error that ended the
    request: EngineFailed, EngineDied, RequestTimedOut, InvalidRequest, or Overloaded if it waited past its time.

    A reader that stops before the end must call `abort`. Everything here belongs to the event loop's thread.

    finish_reasons: of the choices, "error" or "abort" where the engine did not end them; None for open ones.
    gaps: seconds between consecutive tokens of a choice.
    """

    def __init__(self, key: str, request: GenerationRequest, on_abort: Callable[["RequestStream"], None]) -> None:
        """`key` is unique in the server, unlike the ids that clients choose."""
        self.key = key
        self.request = request
        self.timing = RequestTiming(arrival=time.perf_counter())
        self.finish_reasons: list[FinishReason | None] = [None] * request.params.n
        self.error: RequestError | None = None
        self.is_accepted = False
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self.gaps: list[float] = []
        self._last_times: list[float | None] = [None] * request.params.n
        self._on_abort = on_abort
        self._unread: dict[int, list[ChoiceUpdate]] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._waits_for_end = False

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def met_slo(self) -> bool | None:
        """Whether an ended request met its objective; None without one, or if the client aborted it."""
        slo = self.request.slo
        if slo is None or "abort" in self.finish_reasons:
            return None
        has_token = self.timing.first_token is not None and self.error is None
        return slo.is_met(self.timing.ttft if has_token else None, self.gaps)

    @property
    def has_started(self) -> bool:
        """Whether an engine has scheduled it."""
        return self.timing.started is not None

    @property
    def has_ended(self) -> bool:
        return self.timing.finished is not None

    @property
    def num_open(self) -> int:
        """Number of choices that have not ended."""
        return 0 if self.has_ended else self.finish_reasons.count(None)

    def abort(self) -> None:
        """End unfinished choices, within one step of the engine. After the end it does nothing."""
        if not self.has_ended:
            self._on_abort(self)

    async def accepted(self) -> None:
        """Wait until the engine has queued the request. Raises the error that ended it before, above all
        InvalidRequest, so that the status of the HTTP answer is known before the first token."""
        while not self.is_accepted and not self.has_ended:
            await self._wait()
        if self.error is not None and not self.is_accepted:
            raise self.error

    async def wait(self) -> None:
        """Wait for the end without a wake-up for each token. Reading then gives one update for each choice."""
        self._waits_for_end = True
        while not self.has_ended:
            await self._wait()

    async def __anext__(self) -> ChoiceUpdate:
        self._waits_for_end = False
        while True:
            if self._unread:
                index = next(iter(self._unread))
                return ChoiceUpdate.merged(self._unread.pop(index))
            if self.error is not None:
                raise self.error
            if self.has_ended:
                raise StopAsyncIteration
            await self._wait()

    # Called by the client

    def accept(self) -> None:
        self.is_accepted = True
        self._wake()

    def start(self, now: float) -> None:
        """The engine scheduled the request for the first time at `now`."""
        self.timing.started = now

    def take(self, update: ChoiceUpdate, now: float) -> None:
        """Add an update of a step that ended at `now`."""
        self._record(update, now)
        self._unread.setdefault(update.index, []).append(update)
        if self.has_ended or not self._waits_for_end:
            self._wake()

    def end(self, reason: FinishReason, error: RequestError | None = None) -> None:
        """End the open choices for a reason other than the engine's."""
        for index, known in enumerate(self.finish_reasons):
            if known is None:
                self.finish_reasons[index] = reason
                if error is None:
                    self._unread.setdefault(index, []).append(ChoiceUpdate(index, "", [], None, reason))
        self.error = error
        self.timing.finished = time.perf_counter()
        self._wake()

    def resume(self, outputs: list[list[int] | None], now: float) -> None:
        """Continue after tokens that another engine generated, the last of them at `now`; None is an ended choice."""
        for index, tokens in enumerate(outputs):
            if tokens is None:
                self.finish_reasons[index] = "stop"
            elif tokens:
                self._last_times[index] = now

    def _record(self, update: ChoiceUpdate, now: float) -> None:
        """Update times and counts."""
        index, num_tokens = update.index, len(update.token_ids)
        if self.timing.first_token is None:
            self.timing.first_token = now
        last = self._last_times[index]
        if last is not None:
            self.gaps.append(now - last)
        self._last_times[index] = now
        self.num_output_tokens += num_tokens
        self.num_cached_tokens = self.num_cached_tokens or update.num_cached_tokens or 0
        if update.finish_reason is not None:
            self.finish_reasons[index] = update.finish_reason
            if None not in self.finish_reasons:
                self.timing.finished = now

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
