"""The client of one engine process: requests to messages, messages to updates."""

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from dispec.engine.process.messages import (
    Abort,
    Accepted,
    EngineInfo,
    EngineMessage,
    Failed,
    Inspect,
    Inspection,
    IsCompiled,
    Log,
    Refused,
    Resume,
    SharedCores,
    Start,
    StepOutput,
    Submit,
    WorkerPlace,
    encode_params,
)
from dispec.engine.text.text_stream import without_texts
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.client.admission import Admission
from dispec.serving.client.engine_client import EngineClient, State
from dispec.serving.client.engine_supervisor import EngineSupervisor, RestartPolicy
from dispec.serving.client.errors import EngineDied, EngineFailed, InvalidRequest, Overloaded, RequestTimedOut
from dispec.serving.client.output_processor import OutputProcessor
from dispec.serving.client.request_stream import ChoiceUpdate, GenerationRequest, RequestError, RequestStream

log = logging.getLogger("dispec")


class ProcessClient(EngineClient):
    """Starts an engine process, serves requests with it, and restarts it if it dies.

    engine_options: fields of `EngineOptions`.
    max_queued_requests, max_queued_tokens: most requests, and tokens of their prompts, that the engine has not started;
        further requests raise Overloaded.
    stall_seconds: an engine with work that completes no step for so long is not ready.
    shared_cores: where other engines run on the same cores. place: among the workers of a pool.
    has_slos: whether requests are ordered by slack.

    Everything but `OutputProcessor` runs in the event loop's thread.
    """

    def __init__(
        self,
        engine_options: dict[str, Any],
        *,
        max_queued_requests: int,
        max_queued_tokens: int,
        stall_seconds: float,
        restarts: RestartPolicy | None = None,
        show_progress: bool = False,
        shared_cores: SharedCores | None = None,
        place: WorkerPlace | None = None,
        has_slos: bool = False,
    ) -> None:
        super().__init__()
        self._supervisor = EngineSupervisor(
            Start({**engine_options, "show_progress": show_progress}, shared_cores, place),
            receive=self._receive,
            on_state=lambda state: self._notify(lambda observer: observer.on_state(state)),
            on_death=self._fail_all,
            restarts=restarts or RestartPolicy(),
        )
        self._stall_seconds = stall_seconds
        self._has_slos = has_slos
        self._admission = Admission(max_queued_requests, max_queued_tokens)
        self._keys = itertools.count()
        self._streams: dict[str, RequestStream] = {}
        self._processors: dict[str, OutputProcessor] = {}  # the reading thread only looks them up
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._inspections: deque[asyncio.Future[Inspection]] = deque()
        self._num_used_blocks = 0
        self._last_message = 0.0  # when it came from the engine
        self._busy_since = 0.0

    @property
    def state(self) -> State:
        return self._supervisor.state

    @property
    def info(self) -> EngineInfo | None:
        return self._supervisor.info

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._supervisor.tokenizer

    @property
    def num_used_blocks(self) -> int:
        return self._num_used_blocks if self._streams else 0  # no step follows the last one to report free blocks

    @property
    def last_death(self) -> EngineDied | None:
        return self._supervisor.last_death

    @property
    def prefill_tokens_per_second(self) -> float:
        """Measured throughput of prompts; 0 if unknown."""
        return self._admission.prefill_throughput.tokens_per_second

    async def start(self) -> EngineInfo:
        self._loop = asyncio.get_running_loop()
        return await self._supervisor.start()

    async def stop(self) -> None:
        self._fail_all(EngineDied("the server is stopping"))
        await self._supervisor.stop()

    def _stop_accepting(self) -> None:
        self._supervisor.drain()

    def submit(
        self, request: GenerationRequest, make_stream: Callable[..., RequestStream] = RequestStream
    ) -> RequestStream:
        """Begin a request; `make_stream` gets the arguments of `RequestStream`. Raises as `EngineClient.submit`."""
        if self.state != "ready":
            raise self._supervisor.not_ready()
        params = without_texts(request.params, self.tokenizer)
        key = str(next(self._keys))
        num_tokens = len(request.prompt_token_ids)
        # A resumed request has waited already.
        slack_seconds = 0.0 if request.is_resumed or not self._has_slos else self._slack(request)
        self._admission.enter(key, num_tokens, time.perf_counter() + slack_seconds)
        if not self._has_work:
            self._busy_since = time.perf_counter()
        stream = self._streams[key] = make_stream(key, request, self._abort)
        self._processors[key] = OutputProcessor(
            self.tokenizer, request.params, request.prompt_token_ids, request.is_continued, request.kept_token_ids
        )
        if request.timeout is not None:
            self._timers[key] = self._loop.call_later(request.timeout, self._time_out, stream)
        elif request.slo is not None and not request.is_resumed and math.isfinite(request.slo.ttft):
            self._timers[key] = self._loop.call_later(request.slo.ttft, self._shed_late, stream)
        try:
            self._supervisor.send(
                Submit(
                    key,
                    request.prompt_token_ids,
                    encode_params(params),
                    request.priority,
                    request.cache_salt,
                    slack_seconds,
                    request.publish_as,
                    request.pull,
                    request.is_resumed,
                )
            )
        except Exception as error:  # a message that cannot be encoded
            self._end(stream, EngineFailed(f"{type(error).__name__}: {error}"), tell_engine=False)
        return stream

    def _slack(self, request: GenerationRequest) -> float:
        """Return the seconds that a request can wait. Raises Overloaded if its first token cannot come in time."""
        slo = request.slo
        try:
            return self._admission.slack(slo, len(request.prompt_token_ids))
        except Overloaded:
            if slo is not None:
                self._notify(lambda observer: observer.on_shed(slo))
            raise

    def _shed_late(self, stream: RequestStream) -> None:
        """End a request that missed its TTFT target in the queue."""
        slo = stream.request.slo
        if slo is None or stream.has_ended or stream.has_started:
            return
        self._notify(lambda observer: observer.on_shed(slo))
        self._end(stream, Overloaded(f"the request waited for {slo.ttft:g} s, the target of {slo.name!r}"))

    def resume(self, stream: RequestStream, outputs: list[list[int] | None]) -> None:
        """Continue a request after the tokens that each choice has already; None is a choice that has ended."""
        if stream.has_ended:
            return
        self._processors[stream.key].resume(outputs)
        stream.resume(outputs, time.perf_counter())
        self._supervisor.send(Resume(stream.key, outputs))

    def is_ready(self) -> tuple[bool, str]:
        if self.state != "ready":
            return False, str(self._supervisor.not_ready())
        quiet = time.perf_counter() - max(self._last_message, self._busy_since)
        if self._has_work and quiet > self._stall_seconds:
            if not self._inspections:
                self._request_inspection(verify=False)  # keeps the time counting after the requests have been aborted
            return False, f"the engine has work and has not ended a step for {quiet:.0f} s"
        return True, "ready"

    async def inspect(self, *, verify: bool = True) -> Inspection:
        if self.state not in ("ready", "draining"):
            raise self._supervisor.not_ready()
        return await self._request_inspection(verify=verify)

    def _request_inspection(self, *, verify: bool) -> asyncio.Future[Inspection]:
        if not self._has_work:
            self._busy_since = time.perf_counter()
        future: asyncio.Future[Inspection] = self._loop.create_future()
        self._inspections.append(future)
        self._supervisor.send(Inspect(verify))
        return future

    @property
    def _has_work(self) -> bool:
        return bool(self._streams or self._inspections)

    def _abort(self, stream: RequestStream) -> None:
        self._end(stream, None)

    def _time_out(self, stream: RequestStream) -> None:
        self._end(stream, RequestTimedOut(f"the request took longer than {stream.request.timeout:g} s"))

    def _end(self, stream: RequestStream, error: RequestError | None, *, tell_engine: bool = True) -> None:
        if stream.has_ended:
            return
        if tell_engine:
            self._supervisor.send(Abort(stream.key))
        stream.end("abort" if error is None else "error", error)
        self._forget(stream)

    def _fail_all(self, error: EngineDied) -> None:
        for stream in list(self._streams.values()):
            self._end(stream, error.copy(), tell_engine=False)
        while self._inspections:
            future = self._inspections.popleft()
            if not future.done():
                future.set_exception(error.copy())
                future.exception()  # marks it as retrieved: a health probe does not wait for its inspection

    def _forget(self, stream: RequestStream) -> None:
        del self._streams[stream.key], self._processors[stream.key]
        self._admission.leave(stream.key, started=False)
        timer = self._timers.pop(stream.key, None)
        if timer is not None:
            timer.cancel()
        self._notify_finished(stream)

    def _receive(self, message: EngineMessage) -> None:
        """In the reading thread: detokenize, then give the event loop the whole step at once."""
        if isinstance(message, StepOutput):
            self._supervisor.post(self._take_step, message, self._detokenize(message))
        else:
            self._supervisor.post(self._take, message)

    def _detokenize(self, message: StepOutput) -> list[tuple[str, ChoiceUpdate | EngineFailed]]:
        updates: list[tuple[str, ChoiceUpdate | EngineFailed]] = []
        for token in message.tokens:
            processor = self._processors.get(token.request_id)
            if processor is None:
                continue  # aborted
            try:
                update = processor.process(token)
            except Exception as error:  # fails this request alone: the thread serves all requests
                log.exception("a token could not be detokenized")
                updates.append((token.request_id, EngineFailed(f"{type(error).__name__}: {error}")))
                continue
            if update is not None:
                updates.append((token.request_id, update))
        return updates

    def _take_step(self, message: StepOutput, updates: list[tuple[str, ChoiceUpdate | EngineFailed]]) -> None:
        self._last_message = time.perf_counter()
        for key, started in message.started.items():
            self._admission.leave(key, started=True)
            if key in self._streams:
                self._streams[key].start(started)
        for key, update in updates:
            stream = self._streams.get(key)
            if stream is None:
                continue  # aborted
            if isinstance(update, EngineFailed):
                self._end(stream, update)
                continue
            if isinstance(update.stop_reason, str):  # the engine does not know stop strings
                self._supervisor.send(Abort(key, update.index, "stop"))
            is_first = stream.timing.first_token is None
            stream.take(update, message.finished)
            if is_first:
                self._notify_first_token(stream)
            if stream.has_ended and key in self._streams:  # an observer or the stream itself may have aborted it
                self._forget(stream)
        record = message.record
        if record is not None:
            self._num_used_blocks = record.num_used_blocks
            self._admission.prefill_throughput.observe(record)
            self._notify(lambda observer: observer.on_step(record, message.finished))

    def _take(self, message: EngineMessage) -> None:
        self._last_message = time.perf_counter()
        match message:
            case Accepted(request_id=key) if key in self._streams:
                self._streams[key].accept()
            case Refused(request_id=key, message=text, field=field) if key in self._streams:
                self._end(self._streams[key], InvalidRequest(text, field), tell_engine=False)
            case Failed(request_id=key, message=text) if key in self._streams:
                self._end(self._streams[key], EngineFailed(text), tell_engine=False)
            case Inspection():
                future = self._inspections.popleft()
                if not future.done():
                    future.set_result(message)
            case IsCompiled(seconds=seconds) if self.info is not None:
                self.info.is_compiled = True
                self.info.compiled_seconds = seconds
            case Log():
                log.log(message.level, "%s", message.text)
            case _:
                pass  # of a request that has ended meanwhile
