"""A request over several engines: one computes the prompt and the first tokens, another goes on, a third if that dies.

Its reader sees one stream. The front has every token that was generated, so whichever engine goes on is told them, and
computes what it is not sent.
"""

import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from dispec.engine.scheduling.sequence import FinishReason
from dispec.engine.transfer.interface import RemoteBlocks
from dispec.serving.client.engine_client import EngineClient
from dispec.serving.client.engine_errors import EngineDied, TryLater
from dispec.serving.client.request_stream import GenerationRequest, RequestError, RequestStream
from dispec.serving.client.request_text import ChoiceUpdate

MOST_ENGINES = 5  # that a request may lose before it is given up


class SubRequest(RequestStream):
    """What one engine does for a request. It passes on what it hears and keeps nothing."""

    relay: "RequestMigration"
    client: EngineClient

    def accept(self) -> None:
        self.is_accepted = True
        self.relay.accepted(self)

    def take(self, update: ChoiceUpdate, now: float) -> None:
        if self.timing.first_token is None:
            self.timing.first_token = now
        if update.finish_reason is not None:
            self.finish_reasons[update.index] = update.finish_reason
            if None not in self.finish_reasons:
                self.timing.finished = now
        self.relay.took(self, update, now)

    def end(self, reason: FinishReason, error: RequestError | None = None) -> None:
        self.error = error
        self.timing.finished = time.perf_counter()
        self.relay.ended(self, reason, error)


class Tally:
    """The numbers of a request over all its engines, as `RequestText` has them."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.gaps: list[float] = []


class RelayedStream(RequestStream):
    """What the reader of a relayed request reads."""

    text: Any  # a Tally


class RequestMigration:
    """Everything here runs in the event loop.

    request: with a seed, which every engine must have alike. choose: an engine to go on with, or None if none is
    ready. on_first_token, on_end: called once each.
    """

    def __init__(
        self,
        key: str,
        request: GenerationRequest,
        choose: Callable[[], EngineClient | None],
        on_first_token: Callable[["RequestMigration"], None],
        on_end: Callable[["RequestMigration"], None],
    ) -> None:
        self.key = key
        self.request = request
        self.tally = Tally()
        self.stream = RelayedStream(key, request, self.tally, lambda _: self.abort())  # type: ignore[arg-type]
        self._choose = choose
        self._on_first_token = on_first_token
        self._on_end = on_end
        self._outputs: list[list[int]] = [[] for _ in range(request.params.n)]
        self._last_times: list[float | None] = [None] * request.params.n
        self._legs: list[SubRequest] = []
        self._prefill: SubRequest | None = None
        self._decode: SubRequest | None = None
        self._num_lost = 0

    @property
    def role(self) -> Literal["prefill", "decode"]:
        """The kind of engine that has to do something for it now."""
        return "prefill" if self._prefill is not None else "decode"

    @property
    def has_started(self) -> bool:
        """Whether that engine has begun."""
        leg = self._prefill or self._decode
        return leg is not None and leg.timing.started is not None

    def begin(self, prefill: EngineClient, decode: EngineClient, transfer_id: str) -> None:
        """Compute the prompt on one engine, and go on with the other. Raises as `EngineClient.submit`."""
        self._prefill = self._submit(prefill, publish_as=transfer_id, is_continued=True)
        try:
            self._decode = self._submit(decode, is_resumed=True, pull=prefill_ticket(prefill, transfer_id))
        except Exception:
            self._drop(self._prefill)
            raise

    def begin_alone(self, client: EngineClient) -> None:
        """Do everything on one engine."""
        self._decode = self._submit(client)

    def abort(self) -> None:
        self._finish("abort")

    # What the legs hear

    def accepted(self, leg: SubRequest) -> None:
        if all(leg.is_accepted for leg in self._legs):
            self.stream.accept()

    def took(self, leg: SubRequest, update: ChoiceUpdate, now: float) -> None:
        if self.stream.has_ended or leg not in self._legs:
            return
        self._outputs[update.index] += update.token_ids
        self._count(update, now)
        if self.stream.timing.started is None:
            self.stream.timing.started = leg.timing.started
        is_first = self.stream.timing.first_token is None
        self.stream.take(update, now)
        if is_first:
            self._on_first_token(self)
        if self.stream.has_ended:
            self._finish(None)
        elif leg is self._prefill and all(map(self._is_begun, range(len(self._outputs)))):
            self._drop(leg)
            self._hand_over()

    def ended(self, leg: SubRequest, reason: FinishReason, error: RequestError | None) -> None:
        if self.stream.has_ended or leg not in self._legs:
            return
        self._legs.remove(leg)
        if not isinstance(error, EngineDied):
            self._finish(reason, error)
            return
        self._num_lost += 1
        if leg is self._prefill:
            if self._decode is not None and self._decode in self._legs:
                self._hand_over()
            else:
                self._go_on(error)
        elif self._prefill is None:
            self._go_on(error)
        # Else the first tokens are still being computed, and then somebody will be found to go on.

    def _hand_over(self) -> None:
        """The prompt's engine has done what it could: tell the other what there is."""
        self._prefill = None
        if self._decode is not None and self._decode in self._legs:
            self._resume(self._decode)
        else:
            self._go_on(EngineDied("the engine ended before the request did"))

    def _go_on(self, error: EngineDied) -> None:
        """Find an engine that goes on from the tokens there are; end with the error if there is none."""
        client = self._choose() if self._num_lost < MOST_ENGINES else None
        if client is None:
            self._finish("error", error)
            return
        try:
            self._decode = self._submit(client, is_resumed=True)
        except (TryLater, ValueError):
            self._finish("error", error)
            return
        self._resume(self._decode)

    def _resume(self, leg: SubRequest) -> None:
        ends = self.stream.finish_reasons
        outputs = [None if end else tokens for end, tokens in zip(ends, self._outputs, strict=True)]
        leg.client.resume(leg, outputs)

    def _submit(self, client: EngineClient, *, is_resumed: bool = False, **transfer: Any) -> SubRequest:
        def make(*args: Any) -> SubRequest:
            leg = SubRequest(*args)
            leg.relay, leg.client = self, client
            self._legs.append(leg)
            return leg

        return client.submit_as(make, msgspec.structs.replace(self.request, **transfer), is_resumed=is_resumed)

    def _drop(self, leg: SubRequest) -> None:
        if leg in self._legs:
            self._legs.remove(leg)
        leg.abort()

    def _finish(self, reason: FinishReason | None, error: RequestError | None = None) -> None:
        """End the stream for a reason, or none if it has ended by itself, and everything that goes on for it."""
        if reason is not None and not self.stream.has_ended:
            self.stream.end(reason, error)
        legs, self._legs = self._legs, []
        for leg in legs:
            leg.abort()
        on_end, self._on_end = self._on_end, lambda _: None
        on_end(self)

    def _is_begun(self, choice: int) -> bool:
        return bool(self._outputs[choice]) or self.stream.finish_reasons[choice] is not None

    def _count(self, update: ChoiceUpdate, now: float) -> None:
        tally, last = self.tally, self._last_times[update.index]
        tally.num_tokens += len(update.token_ids)
        if last is not None and update.token_ids:
            tally.gaps.append(now - last)
        if update.token_ids:
            self._last_times[update.index] = now
        if update.num_cached_tokens is not None and not tally.num_cached_tokens:
            tally.num_cached_tokens = update.num_cached_tokens


def prefill_ticket(client: EngineClient, transfer_id: str) -> RemoteBlocks:
    """Where the blocks can be had that an engine publishes under that id. Raises ValueError if it cannot."""
    info = client.info
    if info is None or info.engine_id is None or info.transfer_host is None or info.transfer_port is None:
        raise ValueError("kv_transfer is off: this engine cannot hand its KV cache to another")
    return RemoteBlocks(info.engine_id, transfer_id, info.transfer_host, info.transfer_port)
