"""Several engines behind one address, on one machine: some compute prompts, others generate.

To whoever serves HTTP it is an `EngineClient`: it takes requests, and tells the same listeners the same things.
"""

import asyncio
import itertools
import logging
import os
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from dispec.engine.process.messages import EngineInfo, Inspection
from dispec.engine.scheduling.step_record import StepRecord
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.client.engine_client import EngineClient
from dispec.serving.client.engine_errors import EngineDied, NotReady, RequestRefused
from dispec.serving.client.engine_supervisor import State
from dispec.serving.client.listener import Listener
from dispec.serving.client.request_stream import GenerationRequest, RequestStream
from dispec.serving.client.slo import Slo
from dispec.serving.cluster.autoscaling import Observation
from dispec.serving.cluster.request_migration import RequestMigration
from dispec.serving.cluster.worker import Role, Worker

log = logging.getLogger("dispec")

REPLACE_SECONDS = 5.0  # after an engine has died for good, until another one is started; longer each time


def worker_options(engine_options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of each engine of a pool: with a way to move KV blocks between them, and a secret for it.

    Threads are left out: those given are for all engines together.
    """
    others = {name: value for name, value in engine_options.items() if name != "threads"}
    return {"kv_transfer": "auto", "kv_transfer_secret": secrets.token_hex(16), **others}


class WorkerPool:
    """Belongs to the event loop that calls `start`.

    engine_options: fields of `EngineOptions`, for each engine. num_prefill, num_decode: engines of each kind.
    num_cores: threads of all engines together, instead of the option `threads`. Others: as `EngineClient` has them,
    for each engine.
    """

    def __init__(
        self, engine_options: dict[str, Any], *, num_prefill: int, num_decode: int, num_cores: int, **limits: Any
    ) -> None:
        self.listeners: list[Listener] = []
        self._limits = limits
        self._num_cores = num_cores
        self._options = worker_options(engine_options)
        self._numbers = itertools.count()
        self._keys = itertools.count()
        self._relays: dict[str, RequestMigration] = {}
        self._met: deque[bool] = deque(maxlen=100)  # whether the last requests that were promised something got it
        self._drained: asyncio.Future[None] | None = None
        self._is_draining = self._is_stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._told_state: State = "loading"
        self._has_started = False
        count = num_prefill + num_decode
        self.workers = [self._make("prefill", count) for _ in range(num_prefill)]
        self.workers += [self._make("decode", count) for _ in range(num_decode)]

    @property
    def state(self) -> State:
        states = [worker.client.state for worker in self.workers]
        if self._is_draining:
            return "dead" if all(state == "dead" for state in states) else "draining"
        if not self._has_started:
            return "loading"
        if "ready" in states:
            return "ready"
        return "dead" if all(state == "dead" for state in states) else "restarting"

    @property
    def info(self) -> EngineInfo | None:
        """Of an engine that generates; the blocks are those of all."""
        infos = [worker.client.info for worker in reversed(self.workers)]
        known = [info for info in infos if info is not None]
        if not known or not self._has_started:
            return None
        return self._merged(tuple(known))

    @property
    def tokenizer(self) -> Tokenizer | None:
        return next((worker.client.tokenizer for worker in self.workers if worker.client.tokenizer is not None), None)

    @property
    def num_running(self) -> int:
        return sum(relay.stream.num_open for relay in self._relays.values() if relay.stream.timing.started is not None)

    @property
    def num_waiting(self) -> int:
        return sum(relay.stream.num_open for relay in self._relays.values() if relay.stream.timing.started is None)

    @property
    def load(self) -> int:
        return len(self._relays)

    def add_worker(self, role: Role) -> Worker:
        """One more, which somebody must start. It shares the cores with the others."""
        worker = self._make(role, 1 + sum(not worker.is_leaving for worker in self.workers))
        self.workers.append(worker)
        return worker

    async def remove_worker(self, worker: Worker) -> None:
        """End one that has nothing left to do."""
        self.workers.remove(worker)
        await worker.client.stop()

    def _replace(self, worker: Worker) -> None:
        """Have another one in the place of one that served and has died for good."""
        has_served = worker.client.info is not None  # else its start raises the error
        if self._has_started and has_served and not self._is_draining and not worker.is_leaving:
            worker.is_leaving = True
            task = self._loop.create_task(self._start_another(worker))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _start_another(self, dead: Worker) -> None:
        seconds = REPLACE_SECONDS
        while not self._is_draining:
            log.warning("%s engine %d is dead; another one is started in %g s", dead.role, dead.number, seconds)
            await asyncio.sleep(seconds)
            await self.remove_worker(dead)
            dead = self.add_worker(dead.role)
            try:
                await dead.client.start()
                return
            except EngineDied as error:
                log.error("%s engine %d could not be started: %s", dead.role, dead.number, error)
                dead.is_leaving = True
                seconds = min(2 * seconds, 300.0)

    def observe(self, role: Role) -> Observation:
        """What the workers of a kind have to do: prompt tokens and what they compute of them in a second, or
        sequences and how many run at once."""
        relays = [relay for relay in self._relays.values() if relay.role == role]
        workers = [worker for worker in self.workers if worker.role == role and worker.is_ready]
        queued = [relay for relay in relays if not relay.has_started]
        running = [relay for relay in relays if relay.has_started]
        usage = max((worker.kv_usage for worker in workers), default=0.0)
        if role == "decode":
            capacity = next((worker.client.info.max_num_seqs for worker in workers if worker.client.info), 1)
            count, rest = (sum(relay.stream.num_open for relay in some) for some in (queued, running))
        else:
            rates = [worker.prompt_rate.tokens_per_second for worker in workers]
            capacity = max(1, round(max(rates, default=0.0)) or 1000)
            count, rest = (sum(len(relay.request.prompt_token_ids) for relay in some) for some in (queued, running))
        attainment = sum(self._met) / len(self._met) if self._met else 1.0
        return Observation(count, rest, capacity, usage, attainment)

    def num_desired(self, role: Role) -> int:
        return sum(worker.role == role and not worker.is_leaving for worker in self.workers)

    def num_ready(self, role: Role) -> int:
        return sum(worker.role == role and worker.is_ready for worker in self.workers)

    async def start(self) -> EngineInfo:
        """Start all engines and wait until they can serve. Raises EngineDied with the first one's reason."""
        self._loop = asyncio.get_running_loop()
        # One by one: each measures what memory is free, and compiles what the next one finds in the cache.
        for worker in list(self.workers):
            await worker.client.start()
        self._has_started = True
        self._tell_state()
        info = self.info
        assert info is not None
        return info

    async def drain(self, timeout: float | None = None) -> bool:
        """As `EngineClient.drain`."""
        self._is_draining = True
        self._tell_state()
        if self._relays:
            self._drained = self._drained or self._loop.create_future()
            await asyncio.wait((self._drained,), timeout=timeout)
        unfinished = list(self._relays.values())
        for relay in unfinished:
            relay.abort()
        return not unfinished

    async def stop(self) -> None:
        """End all engines, and whatever is under way with an error."""
        self._is_draining = self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(worker.client.stop() for worker in self.workers))
        self._tell_state()

    def submit(self, request: GenerationRequest) -> RequestStream:
        """As `EngineClient.submit`."""
        if self.state != "ready":
            raise self._not_ready()
        if request.publish_as is not None or request.pull is not None:
            raise RequestRefused(
                "kv_transfer_params is for workers: this server moves keys and values by itself", "kv_transfer_params"
            )
        if request.params.seed is None:
            seed = int.from_bytes(os.urandom(8), signed=True)
            request = msgspec.structs.replace(request, params=replace(request.params, seed=seed))
        key = str(next(self._keys))
        relay = RequestMigration(key, request, self._choose, self._on_first_token, self._on_end)
        prefill, decode = self._best("prefill"), self._best("decode")
        if prefill is not None and decode is not None and not self._ends_at_once(request):
            relay.begin(prefill, decode, secrets.token_hex(16))
        else:
            alone = prefill or decode
            if alone is None:
                raise self._not_ready()
            relay.begin_alone(alone)
        self._relays[key] = relay
        return relay.stream

    def is_ready(self) -> tuple[bool, str]:
        """Whether some engine takes requests and gets on with them; if not, why."""
        if self.state != "ready":
            return False, str(self._not_ready())
        answers = [worker.client.is_ready() for worker in self.workers if worker.is_ready]
        return next((answer for answer in answers if answer[0]), answers[0] if answers else (False, "no engine is up"))

    async def inspect(self) -> Inspection:
        """The books of all engines together. Raises NotReady or EngineDied."""
        found = [
            await worker.client.inspect() for worker in self.workers if worker.client.state in ("ready", "draining")
        ]
        if not found:
            raise self._not_ready()
        problems = [one.problem for one in found if one.problem is not None]
        numbers = {
            name: sum(getattr(one, name) for one in found) for name in Inspection.__struct_fields__ if name != "problem"
        }
        return Inspection(**numbers, problem=problems[0] if problems else None)

    def _ends_at_once(self, request: GenerationRequest) -> bool:
        """Whether there is nothing to hand over after the first token."""
        info = self.info
        room = request.params.max_tokens
        if info is not None:
            room = min(room, info.max_model_len - len(request.prompt_token_ids))
        return room <= 1

    def _choose(self) -> EngineClient | None:
        """An engine to go on with what another one lost."""
        return None if self._is_stopping else self._best("decode") or self._best("prefill")

    def _best(self, role: Role) -> EngineClient | None:
        """The one with least to do."""
        ready = [worker for worker in self.workers if worker.role == role and worker.is_ready]
        return min(ready, key=lambda worker: worker.client.load).client if ready else None

    def _make(self, role: Role, count: int) -> Worker:
        # Threads of one step that wait for each other lose most of their time when they must share a core.
        client = EngineClient(self._options, num_threads=max(1, self._num_cores // count), **self._limits)
        worker = Worker(next(self._numbers), role, client)
        client.listeners += [worker.tally, _Forward(self, worker)]
        return worker

    def _merged(self, infos: tuple[EngineInfo, ...]) -> EngineInfo:
        if getattr(self, "_merged_of", None) != tuple(map(id, infos)):
            self._merged_of = tuple(map(id, infos))
            num_blocks = sum(info.num_blocks for info in infos)
            self._merged_info = msgspec.structs.replace(infos[0], num_blocks=num_blocks)
        return self._merged_info

    def _on_first_token(self, relay: RequestMigration) -> None:
        first = relay.stream.first_token()
        self._tell(lambda listener: listener.on_first_token(first))

    def _on_end(self, relay: RequestMigration) -> None:
        if self._relays.pop(relay.key, None) is None:
            return
        summary = relay.stream.summary()
        if summary.met_slo is not None:
            self._met.append(summary.met_slo)
        self._tell(lambda listener: listener.on_request_finished(summary))
        if not self._relays and self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _tell(self, call: Callable[[Listener], None]) -> None:
        for listener in self.listeners:
            try:
                call(listener)
            except Exception:  # whoever watches must not break what is watched
                log.exception("a listener failed")

    def _tell_state(self) -> None:
        state = self.state
        if state != self._told_state:
            self._told_state = state
            self._tell(lambda listener: listener.on_state(state))

    def _not_ready(self) -> NotReady:
        if not self._has_started:
            return NotReady("the model is being loaded", 5)
        if self._is_draining:
            return NotReady("the server is finishing its last requests", 10)
        return NotReady("no engine is up: they are being started again", 5)


class _Forward(Listener):
    """What an engine tells goes to whoever listens to the pool."""

    def __init__(self, pool: WorkerPool, worker: Worker) -> None:
        self._pool = pool
        self._worker = worker

    def on_step(self, record: StepRecord, finished: float) -> None:
        self._worker.note(record)
        self._pool._tell(lambda listener: listener.on_step(record, finished))

    def on_shed(self, slo: Slo) -> None:
        self._pool._met.append(False)
        self._pool._tell(lambda listener: listener.on_shed(slo))

    def on_state(self, state: State) -> None:
        self._pool._tell_state()
        if state == "dead":
            self._pool._replace(self._worker)
