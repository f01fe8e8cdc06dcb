"""The front's side of the engine: requests in, streams of updates out, and an eye on the process that serves them."""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

from engine.messages import (
    Abort,
    Accepted,
    EngineInfo,
    Failed,
    FromEngine,
    FromFront,
    Inspect,
    Inspection,
    Log,
    Refused,
    Shutdown,
    Start,
    StepOutput,
    Submit,
    encode_params,
)
from engine.step_record import StepRecord
from engine.tokenizer import Tokenizer
from serving.admission import Admission
from serving.engine_errors import (
    EngineDied,
    EngineFailed,
    NotReady,
    Overloaded,
    RequestRefused,
    RequestTimedOut,
)
from serving.engine_process import EngineProcess
from serving.request_stream import (
    ChoiceUpdate,
    GenerationRequest,
    RequestError,
    RequestStream,
    RequestSummary,
    RequestText,
    RequestTiming,
)

log = logging.getLogger("dispec")

State = Literal["loading", "ready", "draining", "restarting", "dead"]

_News = list[tuple[RequestStream, tuple[ChoiceUpdate, bool] | EngineFailed]]


class Listener:
    """What happens, for metrics and pages. Called in the event loop, so it must be quick. Override what is of use."""

    def on_step(self, record: StepRecord, finished: float) -> None:
        """A step has ended, at `finished`."""

    def on_request_finished(self, summary: RequestSummary) -> None:
        """A request has ended, in whatever way."""

    def on_state(self, state: State) -> None:
        """The engine's state has changed."""


class EngineClient:
    """Starts an engine process, serves requests with it, and starts it again, once, if it dies.

    engine_options: fields of `EngineOptions`.
    max_queued_requests, max_queued_tokens: that the engine has not started yet; more are Overloaded.
    stall_seconds: without a step while there is work, after which the engine does not count as ready.
    restart_window: a restarted engine that dies within these seconds stays dead.

    Everything but `RequestText` runs in the event loop that called `start`.
    """

    def __init__(
        self,
        engine_options: dict[str, Any],
        *,
        max_queued_requests: int,
        max_queued_tokens: int,
        stall_seconds: float,
        restart_window: float = 60.0,
        show_progress: bool = False,
    ) -> None:
        self.state: State = "loading"
        self.info: EngineInfo | None = None
        self.tokenizer: Tokenizer | None = None
        self.listeners: list[Listener] = []
        self._start_message = Start(engine_options, show_progress)
        self._stall_seconds = stall_seconds
        self._restart_window = restart_window
        self._admission = Admission(max_queued_requests, max_queued_tokens)
        self._keys = itertools.count()
        self._streams: dict[str, RequestStream] = {}  # under way; the reading thread only looks things up
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._inspections: deque[asyncio.Future[Inspection]] = deque()
        self._process: EngineProcess | None = None
        self._restart: asyncio.Task[None] | None = None
        self._restarted = float("-inf")
        self._is_stopping = False
        self._last_news = 0.0  # when the engine last said anything
        self._busy_since = 0.0

    # ------------------------------------------------------------------ the process

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it can serve. Raises EngineDied with its own error and a hint."""
        self._loop = asyncio.get_running_loop()
        try:
            info = await self._launch()
        except EngineDied:
            self._set_state("dead")
            raise
        self._set_state("ready")
        return info

    async def drain(self, timeout: float | None = None) -> bool:
        """Take nothing new and wait for what is under way; what is not done after `timeout` is aborted.

        Returns whether everything was done.
        """
        if self.state == "ready":
            self._set_state("draining")
        deadline = None if timeout is None else time.perf_counter() + timeout
        while self._streams:
            self._drained = self._loop.create_future()
            left = None if deadline is None else max(deadline - time.perf_counter(), 0)
            await asyncio.wait((self._drained,), timeout=left)
            if left == 0:
                break
        unfinished = list(self._streams.values())
        for stream in unfinished:
            stream.abort()
        return not unfinished

    async def stop(self) -> None:
        """End the engine, and whatever is under way with an error. Doing it twice does nothing."""
        self._is_stopping = True
        if self._restart is not None:
            self._restart.cancel()
        self._fail_all(EngineDied("the server is stopping"))
        process = self._process
        if process is not None:
            if self.state in ("ready", "draining"):
                process.send(Shutdown())
                await asyncio.wait((self._exit,), timeout=3)
            for end in (process.terminate, process.kill):
                if not self._exit.done():
                    end()
                    await asyncio.wait((self._exit,), timeout=2)
            if not self._exit.done():
                await self._exit
        self._set_state("dead")

    async def _launch(self) -> EngineInfo:
        self._birth: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._exit: asyncio.Future[None] = self._loop.create_future()
        self._process = EngineProcess(self._start_message, self._receive, self._receive_exit)
        info = await self._birth
        if info.directory is not None and (self.info is None or self.info.directory != info.directory):
            self.tokenizer = await asyncio.to_thread(Tokenizer.from_directory, info.directory)
        self.info = info
        return info

    async def _launch_again(self) -> None:
        try:
            await self._launch()
        except Exception as error:
            log.error("the engine could not be started again: %s", error)
            self._set_state("dead")
        else:
            self._restarted = time.perf_counter()
            log.warning("the engine has been started again and serves")
            self._set_state("ready")

    def _exited(self, ending: EngineDied) -> None:
        assert self._process is not None
        self._process.close()
        self._process = None
        self._exit.set_result(None)
        self._fail_all(ending)
        if ending.traceback:
            log.error("%s", ending.traceback.rstrip())
        if not self._birth.done():
            self._birth.set_exception(ending)
        elif self._is_stopping or self.state == "draining":
            self._set_state("dead")
        elif time.perf_counter() - self._restarted < self._restart_window:
            log.error("the engine died again: %s; it is not started a second time", ending)
            self._set_state("dead")
        else:
            log.warning("the engine died: %s; it is being started again, once", ending)
            self._set_state("restarting")
            self._restart = self._loop.create_task(self._launch_again())

    def _set_state(self, state: State) -> None:
        if state != self.state:
            self.state = state
            self._tell(lambda listener: listener.on_state(state))

    # ------------------------------------------------------------------ requests

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Begin a request. Raises Overloaded, NotReady or RequestRefused; the engine's own refusal comes from the
        stream."""
        if self.state != "ready" or self.info is None:
            raise self._not_ready()
        num_tokens, limit = len(request.prompt_token_ids), self.info.max_model_len
        if num_tokens >= limit:  # the engine says so as well, but need not be sent megabytes for it
            raise RequestRefused(
                f"prompt has {num_tokens} tokens, must be below max_model_len ({limit}) to leave room for an answer"
            )
        params = request.params
        if params.stop and self.tokenizer is None:
            raise RequestRefused("stop is given, but a model without a tokenizer makes no text")
        if params.stop or params.bad_words:
            bad_words = (*params.bad_words_token_ids, *self._bad_word_token_ids(params.bad_words))
            params = replace(params, stop=(), bad_words=(), bad_words_token_ids=bad_words)
        key = str(next(self._keys))
        self._admission.enter(key, num_tokens)
        stream = RequestStream(key, request, RequestText(self.tokenizer, request.params), self._abort)
        if not self._is_waited_for:
            self._busy_since = time.perf_counter()
        self._streams[key] = stream
        if request.timeout is not None:
            self._timers[key] = self._loop.call_later(request.timeout, self._time_out, stream)
        self._send(Submit(key, request.prompt_token_ids, encode_params(params), request.priority, request.cache_salt))
        return stream

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
            return False, str(self._not_ready())
        quiet = time.perf_counter() - max(self._last_news, self._busy_since)
        if self._is_waited_for and quiet > self._stall_seconds:
            if not self._inspections:
                self._ask_for_inspection()  # so that it goes on counting when the requests have been given up
            return False, f"the engine has work and has not ended a step for {quiet:.0f} s"
        return True, "ready"

    async def inspect(self) -> Inspection:
        """The engine's books, proved between two steps. Raises NotReady or EngineDied."""
        if self._process is None or self.state not in ("ready", "draining"):
            raise self._not_ready()
        return await self._ask_for_inspection()

    def _ask_for_inspection(self) -> asyncio.Future[Inspection]:
        if not self._is_waited_for:
            self._busy_since = time.perf_counter()
        future: asyncio.Future[Inspection] = self._loop.create_future()
        self._inspections.append(future)
        self._send(Inspect())
        return future

    @property
    def _is_waited_for(self) -> bool:
        return bool(self._streams or self._inspections)

    def _not_ready(self) -> NotReady:
        loading = sum(self.info.phase_seconds.values()) if self.info is not None else 10
        why, retry_after = {
            "loading": ("the model is being loaded", 5),
            "ready": ("the engine has just ended", 5),
            "restarting": ("the engine died and is being started again", max(round(loading), 1)),
            "draining": ("the server is finishing its last requests", 10),
            "dead": ("the engine is dead and will not be started again", 60),
        }[self.state]
        return NotReady(why, retry_after)

    def _bad_word_token_ids(self, bad_words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The token ids of texts that shall not be generated, at the start of a word and within one."""
        if bad_words and self.tokenizer is None:
            raise RequestRefused("bad_words is given, but a model without a tokenizer makes no text")
        assert self.tokenizer is not None or not bad_words
        found: dict[tuple[int, ...], None] = {}
        for word in bad_words:
            for text in (word.lstrip(), " " + word.lstrip()):
                if self.tokenizer and (ids := tuple(self.tokenizer.encode(text, add_special_tokens=False))):
                    found[ids] = None
        return tuple(found)

    def _abort(self, stream: RequestStream) -> None:
        self._end(stream, None, tell_engine=True)

    def _time_out(self, stream: RequestStream) -> None:
        error = RequestTimedOut(f"the request took longer than {stream.request.timeout:g} s")
        self._end(stream, error, tell_engine=True)

    def _end(self, stream: RequestStream, error: RequestError | None, *, tell_engine: bool) -> None:
        if stream.has_ended:
            return
        if tell_engine:
            self._send(Abort(stream.key))
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

    _drained: asyncio.Future[None] | None = None

    def _send(self, message: FromFront) -> None:
        if self._process is not None:
            self._process.send(message)

    def _tell(self, call: Callable[[Listener], None]) -> None:
        for listener in self.listeners:
            try:
                call(listener)
            except Exception:  # whoever watches must not break what is watched
                log.exception("a listener failed")

    # ------------------------------------------------------------------ what the engine says

    def _receive(self, message: FromEngine) -> None:
        """In the reading thread: make text of tokens, then hand the whole step to the event loop at once."""
        if isinstance(message, StepOutput):
            self._post(self._take_step, message, self._make_texts(message))
        else:
            self._post(self._take, message)

    def _receive_exit(self, ending: EngineDied) -> None:
        self._post(self._exited, ending)

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop has been closed, and with it everybody's interest
            log.debug("the engine speaks to a closed event loop")

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
                self._send(Abort(stream.key, update.index, "stop"))
            stream.take(update, message.finished)
            if stream.has_ended:
                self._forget(stream)
        record = message.record
        if record is not None:
            self._tell(lambda listener: listener.on_step(record, message.finished))

    def _take(self, message: FromEngine) -> None:
        self._last_news = time.perf_counter()
        match message:
            case EngineInfo():
                self._birth.set_result(message)
            case Accepted(request_id=key) if key in self._streams:
                self._streams[key].accept()
            case Refused(request_id=key, message=text) if key in self._streams:
                self._end(self._streams[key], RequestRefused(text), tell_engine=False)
            case Failed(request_id=key, message=text) if key in self._streams:
                self._end(self._streams[key], EngineFailed(text), tell_engine=False)
            case Inspection():
                future = self._inspections.popleft()
                if not future.done():
                    future.set_result(message)
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
