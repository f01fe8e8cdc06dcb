"""The interface between the HTTP server and its engines: one engine process, or a pool of them."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Literal

from dispec.engine.process.messages import EngineInfo, Inspection
from dispec.engine.scheduling.step_record import StepRecord
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.client.errors import EngineDied
from dispec.serving.client.request_stream import GenerationRequest, RequestStream
from dispec.serving.client.slo import Slo

log = logging.getLogger("dispec")

State = Literal["loading", "ready", "draining", "restarting", "dead"]


class EngineObserver:
    """Receives the events of an engine, in the event loop: each call must be quick. An exception is logged and ignored.

    Subclasses override the methods that they need.
    """

    def on_step(self, record: StepRecord, finished: float) -> None:
        """A step has ended, at `finished`."""

    def on_first_token(self, stream: RequestStream) -> None:
        """A request has its first token."""

    def on_request_finished(self, stream: RequestStream) -> None:
        """A request has ended: completed, failed or aborted."""

    def on_refused(self) -> None:
        """A request was refused with 503: no engine takes any, the queue is full, or it cannot meet its TTFT target."""

    def on_shed(self, slo: Slo) -> None:
        """A request of this class was rejected: its first token would have come too late."""

    def on_state(self, state: State) -> None:
        """The engine's state has changed."""


class EngineClient(ABC):
    """Serves requests and notifies observers. It belongs to the event loop that calls `start`."""

    _streams: Mapping[str, RequestStream]  # unfinished requests by key

    def __init__(self) -> None:
        self.observers: list[EngineObserver] = []
        self._drained: asyncio.Future[None] | None = None

    @property
    @abstractmethod
    def state(self) -> State: ...

    @property
    @abstractmethod
    def info(self) -> EngineInfo | None:
        """What the engine serves; None until it is ready for the first time."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None until the engine is ready, and for a model without one."""

    @property
    def num_used_blocks(self) -> int:
        """KV blocks that the last step used; 0 without requests."""
        return 0

    @property
    def last_death(self) -> EngineDied | None:
        """Why the engine that died last did; None before."""
        return None

    @abstractmethod
    async def start(self) -> EngineInfo:
        """Start the engine and wait until it can serve. Raises EngineDied with the engine's own error and a hint."""

    @abstractmethod
    async def stop(self) -> None:
        """End the engine, and unfinished requests with an error. A second call does nothing."""

    @abstractmethod
    def submit(self, request: GenerationRequest) -> RequestStream:
        """Begin a request. Raises Overloaded, NotReady or InvalidField; the stream raises the engine's refusal."""

    @abstractmethod
    def is_ready(self) -> tuple[bool, str]:
        """Return whether requests are accepted and make progress, and the reason if not."""

    @abstractmethod
    async def inspect(self, *, verify: bool = True) -> Inspection:
        """Return the scheduler's counts between two steps. Raises NotReady or EngineDied.

        verify: check that the block pool's books agree, which takes time proportional to the number of blocks.
        """

    @abstractmethod
    def _stop_accepting(self) -> None:
        """Reject new requests from now on."""

    async def drain(self, timeout: float | None = None) -> bool:
        """Reject new requests and wait for unfinished ones; abort those that remain after `timeout` seconds.

        Returns whether all of them completed.
        """
        self._stop_accepting()
        if self._streams:
            self._drained = self._drained or asyncio.get_running_loop().create_future()
            await asyncio.wait((self._drained,), timeout=timeout)
        unfinished = list(self._streams.values())
        for stream in unfinished:
            stream.abort()
        return not unfinished

    @property
    def streams(self) -> Collection[RequestStream]:
        """Unfinished requests, in the order of their arrival."""
        return self._streams.values()

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that the last step used; 0 without requests."""
        return self.num_used_blocks / self.info.num_blocks if self.info is not None else 0.0

    @property
    def load(self) -> int:
        """Number of unfinished requests."""
        return len(self._streams)

    @property
    def num_running(self) -> int:
        """Unfinished choices of requests that an engine has started."""
        return sum(stream.num_open for stream in self._streams.values() if stream.has_started)

    @property
    def num_waiting(self) -> int:
        """Choices of requests that no engine has started."""
        return sum(stream.num_open for stream in self._streams.values() if not stream.has_started)

    def report_refusal(self) -> None:
        """Tell the observers of a request that was not accepted."""
        self._notify(lambda observer: observer.on_refused())

    def _notify(self, call: Callable[[EngineObserver], None]) -> None:
        for observer in self.observers:
            try:
                call(observer)
            except Exception:
                log.exception("an observer of the engine failed")

    def _notify_first_token(self, stream: RequestStream) -> None:
        self._notify(lambda observer: observer.on_first_token(stream))

    def _notify_finished(self, stream: RequestStream) -> None:
        """Report a request that was removed from `_streams`."""
        self._notify(lambda observer: observer.on_request_finished(stream))
        if not self._streams and self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
