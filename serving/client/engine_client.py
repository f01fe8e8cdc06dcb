"""The front's side of the engine: requests in, streams of updates out, and an eye on the process that serves them."""

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from dispec.engine.errors import ContextOverflow, InvalidField
from dispec.engine.process.messages import (
    Abort,
    Accepted,
    EngineInfo,
    Failed,
    FromEngine,
    Inspect,
    Inspection,
    IsCompiled,
    Log,
    Refused,
    Resume,
    Start,
    StepOutput,
    Submit,
    encode_params,
)
from dispec.engine.text.text_stream import without_texts
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.client.admission import Admission, PromptRate
from dispec.serving.client.engine_errors import (
    EngineDied,
    EngineFailed,
    NotReady,
    Overloaded,
    RequestRefused,
    RequestTimedOut,
)
from dispec.serving.client.engine_supervisor import EngineSupervisor, State
from dispec.serving.client.listener import Listener
from dispec.serving.client.request_stream import (
    GenerationRequest,
    RequestError,
    RequestStream,
    RequestSummary,
    RequestTiming,
)
from dispec.serving.client.request_text import ChoiceUpdate, RequestText
from dispec.serving.client.restart_policy import RestartPolicy
from dispec.serving.client.slo import is_hopeless, slack

log = logging.getLogger("dispec")

Stream = TypeVar("Stream", bound=RequestStream)

_News = list[tuple[RequestStream, tuple[ChoiceUpdate, bool] | EngineFailed]]


class EngineClient:
    """Starts an engine process, serves requests with it, and starts it again if it dies.

    engine_options: fields of `EngineOptions`.
    max_queued_requests, max_queued_tokens: that the engine has not started yet; more are Overloaded.
    stall_seconds: without a step while there is work, after which the engine does not count as ready.
    restarts: how often, and when, an engine that dies is started again.
    num_threads: of the engine; None takes a thread for each core.
    has_slos: whether there are classes of requests with promises, so that those without one can wait for them.

    Everything but `RequestText` runs in the event loop that called `start`.
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
        num_threads: int | None = None,
        has_slos: bool = False,
    ) -> None:
        self.listeners: list[Listener] = []
        self._supervisor = EngineSupervisor(
            Start(engine_options, show_progress, num_threads),
            receive=self._receive,
            on_state=lambda state: self._tell(lambda listener: listener.on_state(state)),
            on_death=self._fail_all,
            restarts=restarts or RestartPolicy(),
        )
        self._stall_seconds = stall_seconds
        self._has_slos = has_slos
        self._prompt_rate = PromptRate()
        self._admission = Admission(max_queued_requests, max_queued_tokens)
        self._keys = itertools.count()
        self._streams: dict[str, RequestStream] = {}  # under way; the reading thread only looks things up
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._inspections: deque[asyncio.Future[Inspection]] = deque()
        self._drained: asyncio.Future[None] | None = None
        self._last_news = 0.0  # when the engine last said anything
        self._busy_since = 0.0

    @property
    def state(self) -> State:
        return self._supervisor.state

    @property
    def info(self) -> EngineInfo | None:
        """Of the engine; None until it is ready for the first time."""
        return self._supervisor.info

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's; None until the engine is ready, and for a model without one."""
        return self._supervisor.tokenizer

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it can serve. Raises EngineDied with its own error and a hint."""
        self._loop = asyncio.get_running_loop()
        return await self._supervisor.start()

    async def drain(self, timeout: float | None = None) -> bool:
        """Take nothing new and wait for what is under way; what is not done after `timeout` is aborted.

        Returns whether everything was done.
        """
        self._supervisor.drain()
        if self._streams:
            self._drained = self._drained or self._loop.create_future()
            await asyncio.wait((self._drained,), timeout=timeout)
        unfinished = list(self._streams.values())
        for stream in unfinished:
            stream.abort()
        return not unfinished

    async def stop(self) -> None:
        """End the engine, and whatever is under way with an error. Doing it twice does nothing."""
        self._fail_all(EngineDied("the server is stopping"))
        await self._supervisor.stop()

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Begin a request. Raises Overloaded, NotReady, RequestRefused or ContextOverflow; the engine's own refusal
        comes from the stream."""
        return self.submit_as(RequestStream, request)

    def submit_as(self, make: Callable[..., Stream], request: GenerationRequest, *, is_resumed: bool = False) -> Stream:
        """The same for a stream of another kind, which `make` makes of `RequestStream`'s arguments.

        is_resumed: the engine waits for `resume`.
        """
        if self.state != "ready" or self.info is None:
            raise self._supervisor.not_ready()
        num_tokens, limit = len(request.prompt_token_ids), self.info.max_model_len
        if num_tokens >= limit:  # the engine says so as well, but need not be sent megabytes for it
            raise ContextOverflow("prompt", f"prompt has {num_tokens} tokens", limit)
        for token_id in request.prompt_token_ids:
            if not 0 <= token_id < 2**31:  # a message could not carry it; what else there is to say, the engine says
                last = self.info.vocab_size - 1
                raise RequestRefused(f"prompt holds token id {token_id}, must be in 0 … {last}", "prompt")
        try:
            params = without_texts(request.params, self.tokenizer)
        except InvalidField as error:
            raise RequestRefused(str(error), error.field) from None
        key = str(next(self._keys))
        # Who goes on elsewhere has waited already.
        slack_seconds = 0.0 if is_resumed or not self._has_slos else self._slack(request)
        message = Submit(
            key,
            request.prompt_token_ids,
            encode_params(params),
            request.priority,
            request.cache_salt,
            slack_seconds,
            request.publish_as,
            request.pull,
            is_resumed,
        )
        self._admission.enter(key, num_tokens, time.perf_counter() + slack_seconds)
        text = RequestText(self.tokenizer, request.params, request.prompt_token_ids, request.is_continued)
        stream = make(key, request, text, self._abort)
        if not self._is_waited_for:
            self._busy_since = time.perf_counter()
        self._streams[key] = stream
        if request.timeout is not None:
            self._timers[key] = self._loop.call_later(request.timeout, self._time_out, stream)
        elif request.slo is not None and not is_resumed and math.isfinite(request.slo.ttft):
            self._timers[key] = self._loop.call_later(request.slo.ttft, self._shed_late, stream)
        try:
            self._supervisor.send(message)
        except Exception as error:  # what cannot be sent must not be waited for
            self._end(stream, EngineFailed(f"{type(error).__name__}: {error}"), tell_engine=False)
        return stream

    def _slack(self, request: GenerationRequest) -> float:
        """Seconds that a request can wait. Raises Overloaded if its first token cannot come in time."""
        num_tokens, rate = len(request.prompt_token_ids), self._prompt_rate.tokens_per_second
        seconds = slack(request.slo, num_tokens, rate)
        before = self._admission.tokens_before(time.perf_counter() + seconds)
        if request.slo is not None and is_hopeless(request.slo, num_tokens, before, rate):
            self._tell(lambda listener: listener.on_shed(request.slo))  # type: ignore[arg-type]
            raise Overloaded(
                f"the first token cannot come within {request.slo.ttft:g} s, as {request.slo.name!r} is promised:"
                f" {before} prompt tokens are before it",
                self._admission.retry_after(),
            )
        return seconds

    def _shed_late(self, stream: RequestStream) -> None:
        """Its time has passed: if it has not begun, it need not any more."""
        slo = stream.request.slo
        if slo is None or stream.has_ended or stream.timing.started is not None:
            return
        self._tell(lambda listener: listener.on_shed(slo))
        error = Overloaded(f"the request waited for {slo.ttft:g} s, which {slo.name!r} is promised", 5)
        self._end(stream, error, tell_engine=True)

    def resume(self, stream: RequestStream, outputs: list[list[int] | None]) -> None:
        """Let a request go on after the tokens that each choice has already; None is a choice that has ended."""
        if stream.has_ended:
            return
        stream.text.resume(outputs, time.perf_counter())
        for index, tokens in enumerate(outputs):
            if tokens is None:
                stream.finish_reasons[index] = "stop"
        self._supervisor.send(Resume(stream.key, outputs))

    @property
    def num_running(self) -> int:
        """Choices of requests that the engine has started."""
        return sum(stream.num_open for stream in self._streams.values() if stream.timing.started is not None)

    @property
    def num_waiting(self) -> int:
        """Choices of requests that the engine has not started."""
        return sum(stream.num_open for stream in self._streams.values() if stream.timing.started is None)

    @property
    def load(self) -> int:
        """Requests under way."""
        return len(self._streams)

    def is_ready(self) -> tuple[bool, str]:
        """Whether the engine takes requests and gets on with those it has; if not, why."""
        if self.state != "ready":
            return False, str(self._supervisor.not_ready())
        quiet = time.perf_counter() - max(self._last_news, self._busy_since)
        if self._is_waited_for and quiet > self._stall_seconds:
            if not self._inspections:
                self._ask_for_inspection()  # so that it goes on counting when the requests have been given up
            return False, f"the engine has work and has not ended a step for {quiet:.0f} s"
        return True, "ready"

    async def inspect(self) -> Inspection:
        """The engine's books, proved between two steps. Raises NotReady or EngineDied."""
        if self.state not in ("ready", "draining"):
            raise self._supervisor.not_ready()
        return await self._ask_for_inspection()

    def _ask_for_inspection(self) -> asyncio.Future[Inspection]:
        if not self._is_waited_for:
            self._busy_since = time.perf_counter()
        future: asyncio.Future[Inspection] = self._loop.create_future()
        self._inspections.append(future)
        self._supervisor.send(Inspect())
        return future

    @property
    def _is_waited_for(self) -> bool:
        return bool(self._streams or self._inspections)

    def _abort(self, stream: RequestStream) -> None:
        self._end(stream, None, tell_engine=True)

    def _time_out(self, stream: RequestStream) -> None:
        error = RequestTimedOut(f"the request took longer than {stream.request.timeout:g} s")
        self._end(stream, error, tell_engine=True)

    def _end(self, stream: RequestStream, error: RequestError | None, *, tell_engine: bool) -> None:
        if stream.has_ended:
            return
        if tell_engine:
            self._supervisor.send(Abort(stream.key))
        stream.end("abort" if error is None else "error", error)
        self._forget(stream)

    def _fail_all(self, ending: EngineDied) -> None:
        for stream in list(self._streams.values()):
            # Each gets its own, for a traceback grows with every raise.
            self._end(stream, EngineDied(ending.message, ending.hint, ending.error), tell_engine=False)
        while self._inspections:
            future = self._inspections.popleft()
            if not future.done():
                future.set_exception(EngineDied(ending.message, ending.hint, ending.error))
                future.exception()  # a probe's is nobody's business

    def _forget(self, stream: RequestStream) -> None:
        del self._streams[stream.key]
        self._admission.leave(stream.key, started=False)
        timer = self._timers.pop(stream.key, None)
        if timer is not None:
            timer.cancel()
        summary = stream.summary()
        self._tell(lambda listener: listener.on_request_finished(summary))
        if not self._streams and self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _tell(self, call: Callable[[Listener], None]) -> None:
        for listener in self.listeners:
            try:
                call(listener)
            except Exception:  # whoever watches must not break what is watched
                log.exception("a listener failed")

    def _receive(self, message: FromEngine) -> None:
        """In the reading thread: make text of tokens, then hand the whole step to the event loop at once."""
        if isinstance(message, StepOutput):
            self._supervisor.post(self._take_step, message, self._make_texts(message))
        else:
            self._supervisor.post(self._take, message)

    def _make_texts(self, message: StepOutput) -> _News:
        news: _News = []
        for token in message.tokens:
            stream = self._streams.get(token.request_id)
            if stream is None:
                continue  # aborted
            try:
                found = stream.text.take(token, message.finished)
            except Exception as error:  # one request's text shall not end the thread that makes everybody's
                log.exception("request %s: its text could not be made", stream.request.request_id)
                news.append((stream, EngineFailed(f"{type(error).__name__}: {error}")))
                continue
            if found is not None:
                news.append((stream, found))
        return news

    def _take_step(self, message: StepOutput, news: _News) -> None:
        self._last_news = time.perf_counter()
        for key, started in message.started.items():
            self._admission.leave(key, started=True)
            if key in self._streams:
                self._streams[key].timing.started = started
        for stream, found in news:
            if stream.has_ended:
                continue
            if isinstance(found, EngineFailed):
                self._end(stream, found, tell_engine=True)
                continue
            update, has_stopped = found
            if has_stopped:
                self._supervisor.send(Abort(stream.key, update.index, "stop"))
            self._update(stream, update, message.finished)
        record = message.record
        if record is not None:
            self._prompt_rate.note(record)
            self._tell(lambda listener: listener.on_step(record, message.finished))

    def _update(self, stream: RequestStream, update: ChoiceUpdate, now: float) -> None:
        is_first = stream.timing.first_token is None
        stream.take(update, now)
        if is_first:
            first = stream.first_token()
            self._tell(lambda listener: listener.on_first_token(first))
        if stream.has_ended and stream.key in self._streams:  # who took it may have aborted it
            self._forget(stream)

    def _take(self, message: FromEngine) -> None:
        self._last_news = time.perf_counter()
        match message:
            case Accepted(request_id=key) if key in self._streams:
                self._streams[key].accept()
            case Refused(request_id=key, message=text, field=field) if key in self._streams:
                self._end(self._streams[key], RequestRefused(text, field), tell_engine=False)
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
                pass  # about a request that has ended meanwhile


__all__ = [
    "ChoiceUpdate",
    "EngineClient",
    "EngineDied",
    "EngineFailed",
    "GenerationRequest",
    "Listener",
    "NotReady",
    "Overloaded",
    "RequestRefused",
    "RequestStream",
    "RequestSummary",
    "RequestTimedOut",
    "RequestTiming",
    "State",
]
