"""Keeps an engine process alive: starts it, restarts it after a failure, and ends it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dispec.engine.process.messages import EngineInfo, EngineMessage, FrontendMessage, Shutdown, Start
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.client.engine_client import State
from dispec.serving.client.engine_process import EngineProcess
from dispec.serving.client.errors import EngineDied, NotReady

log = logging.getLogger("dispec")

_REASONS: dict[State, tuple[str, int]] = {  # why no request is accepted, and seconds until a retry makes sense
    "loading": ("the model is being loaded", 5),
    "restarting": ("the engine died and is being restarted", 5),
    "draining": ("the server is finishing its last requests", 10),
    "dead": ("the engine is dead and will not be restarted", 60),
}


@dataclass(frozen=True)
class RestartPolicy:
    """When a dead engine is restarted: the first time at once, then after delays that double.

    max_restarts: in a row; after these the engine stays dead. delay, max_delay: seconds before the second restart, and
    before any. healthy_seconds: time in service after which the count starts again.
    """

    max_restarts: int = 5
    delay: float = 1.0
    max_delay: float = 30.0
    healthy_seconds: float = 60.0

    def delay_before(self, num_restarts: int) -> float:
        """Return the seconds to wait before the next restart, after `num_restarts` in a row."""
        if num_restarts == 0:
            return 0.0
        return min(self.delay * 2.0 ** (num_restarts - 1), self.max_delay)


class EngineSupervisor:
    """Belongs to the event loop that calls `start`.

    receive: gets the engine's messages except `EngineInfo`, in a thread of its own.
    on_state: called when the state has changed; on_death: when the process has ended with all its requests.
    clock, sleep: the time, replaced in tests.

    info, tokenizer: of the engine that runs or ran last; None until the first one is ready.
    last_death: why the engine that died last did; None before.
    """

    def __init__(
        self,
        start: Start,
        receive: Callable[[EngineMessage], None],
        on_state: Callable[[State], None],
        on_death: Callable[[EngineDied], None],
        restarts: RestartPolicy,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.state: State = "loading"
        self.info: EngineInfo | None = None
        self.tokenizer: Tokenizer | None = None
        self.last_death: EngineDied | None = None
        self._start = start
        self._receive = receive
        self._on_state = on_state
        self._on_death = on_death
        self._restarts = restarts
        self._clock = clock
        self._sleep = sleep
        self._num_restarts = 0  # in a row
        self._ready_since = self._next_launch = clock()
        self._restart: asyncio.Task[None] | None = None
        self._process: EngineProcess | None = None
        self._is_draining = False

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it can serve. Raises EngineDied."""
        self._loop = asyncio.get_running_loop()
        try:
            info = await self._launch()
        except EngineDied:
            self._set_state("dead")
            raise
        self._serve()
        return info

    def drain(self) -> None:
        """Accept no more requests, and do not restart an engine that dies."""
        self._is_draining = True
        if self.state == "ready":
            self._set_state("draining")

    async def stop(self) -> None:
        """End the engine. A second call does nothing."""
        self.drain()
        if self._restart is not None:
            self._restart.cancel()
        if self._process is not None:
            await self._end(self._process, gently=self.state == "draining")
        self._set_state("dead")

    def send(self, message: FrontendMessage) -> None:
        if self._process is not None:
            self._process.send(message)

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Call a function in the event loop, from any thread."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            log.debug("the engine sent a message to a closed event loop")

    def not_ready(self) -> NotReady:
        """Return the reason why the engine accepts no requests now."""
        why, retry_after = _REASONS.get(self.state, ("the engine has just ended", 5))
        if self.state == "restarting" and self.info is not None:
            waiting = max(self._next_launch - self._clock(), 0.0)
            retry_after = max(round(waiting + sum(self.info.phase_seconds.values())), 1)
        return NotReady(why, retry_after)

    async def _launch(self) -> EngineInfo:
        """Start a process and wait until it is ready. Raises EngineDied."""
        self._ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._exit: asyncio.Future[EngineDied] = self._loop.create_future()
        self._process = process = EngineProcess(self._start, self._receive_message, self._receive_exit)
        await asyncio.wait((self._ready, self._exit), return_when=asyncio.FIRST_COMPLETED)
        if self._ready.done():
            info = self._ready.result()
            try:
                if info.directory is not None:
                    self.tokenizer = await asyncio.to_thread(Tokenizer.from_directory, info.directory)
            except Exception as error:
                await self._end(process, gently=False)
                hint = "the engine runs without a tokenizer, the server needs it"
                raise EngineDied(str(error), hint, type(error).__name__) from error
            self.info = info
        if self._exit.done():
            raise self._exit.result()
        return info

    def _serve(self) -> None:
        self._ready_since = self._clock()
        self._set_state("draining" if self._is_draining else "ready")

    async def _relaunch(self, ending: EngineDied) -> None:
        """Restart the engine, as often as the policy allows, until it serves."""
        while self._num_restarts < self._restarts.max_restarts and not self._is_draining:
            seconds = self._restarts.delay_before(self._num_restarts)
            self._num_restarts += 1
            self._next_launch = self._clock() + seconds
            of_all = f"{self._num_restarts} of {self._restarts.max_restarts}"
            log.warning("the engine died: %s; it is restarted in %g s (restart %s)", ending, seconds, of_all)
            await self._sleep(seconds)
            try:
                await self._launch()
            except EngineDied as error:
                ending = error
            else:
                log.warning("the engine has been restarted and serves")
                self._serve()
                return
        if self._is_draining:
            self._set_state("dead")
        else:
            self._give_up(ending)

    def _give_up(self, ending: EngineDied) -> None:
        log.error("the engine died: %s; after %d restarts in a row it stays dead", ending, self._num_restarts)
        self._set_state("dead")

    async def _end(self, process: EngineProcess, *, gently: bool) -> None:
        """End the process: on request if `gently`, and by force after 3 s."""
        if gently:
            process.send(Shutdown())
            await asyncio.wait((self._exit,), timeout=3)
        if not self._exit.done():
            process.kill()
        await asyncio.wait((self._exit,))

    def _receive_message(self, message: EngineMessage) -> None:
        if isinstance(message, EngineInfo):
            self.post(self._ready.set_result, message)
        else:
            self._receive(message)

    def _receive_exit(self, ending: EngineDied) -> None:
        self.post(self._exited, ending)

    def _exited(self, ending: EngineDied) -> None:
        assert self._process is not None
        self._process.close()
        self._process = None
        self.last_death = ending
        if ending.traceback:
            log.error("%s", ending.traceback.rstrip())
        if self.state == "ready":
            if self._clock() - self._ready_since >= self._restarts.healthy_seconds:
                self._num_restarts = 0
            if self._num_restarts < self._restarts.max_restarts:
                self._set_state("restarting")
                self._restart = self._loop.create_task(self._relaunch(ending))
            else:
                self._give_up(ending)
        elif self.state == "draining":
            self._set_state("dead")
        self._exit.set_result(ending)
        self._on_death(ending)

    def _set_state(self, state: State) -> None:
        if state != self.state:
            self.state = state
            self._on_state(state)
