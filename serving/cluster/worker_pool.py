"""Several engines behind one address, on one machine: prefill workers compute prompts, decode workers generate."""

import asyncio
import itertools
import logging
import os
import secrets
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from dispec.engine.machine.owned_directory import OwnedDirectory
from dispec.engine.process.messages import EngineInfo, Inspection, Role, SharedCores, WorkerPlace
from dispec.engine.scheduling.step_record import StepRecord
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.client.engine_client import EngineClient, EngineObserver, State
from dispec.serving.client.errors import EngineDied, InvalidRequest, NotReady
from dispec.serving.client.process_client import ProcessClient
from dispec.serving.client.request_stream import GenerationRequest, RequestStream
from dispec.serving.client.slo import Slo
from dispec.serving.cluster.autoscaling import Observation
from dispec.serving.cluster.request_migration import MigratedStream
from dispec.serving.cluster.worker import Worker

log = logging.getLogger("dispec")

REPLACE_SECONDS = 5.0  # from the final death of an engine to the start of another one; doubles with each failure


def worker_options(engine_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of each engine of a pool: with a KV transport, and a secret for it."""
    return {"kv_transfer": "auto", "kv_transfer_secret": secrets.token_hex(16), **engine_options}


class WorkerPool(EngineClient):
    """An engine client with several engine processes.

    engine_options: fields of `EngineOptions`, for each engine. num_prefill, num_decode: engines of each role.
    limits: as of `ProcessClient`, for each engine.
    """

    def __init__(self, engine_options: dict[str, Any], *, num_prefill: int, num_decode: int, **limits: Any) -> None:
        super().__init__()
        self._limits = limits
        self._directory = OwnedDirectory("dispec-workers-")
        self._cores_path = os.path.join(self._directory.path, "cores")
        open(self._cores_path, "x").close()
        self._options = worker_options(engine_options)
        self._numbers = itertools.count()
        self._keys = itertools.count()
        self._streams: dict[str, MigratedStream] = {}
        self._met_slos: deque[bool] = deque(maxlen=100)  # of the last requests that had one
        self._is_draining = self._is_stopping = self._has_started = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._notified_state: State = "loading"
        self._merged: tuple[tuple[EngineInfo, ...], EngineInfo | None] = ((), None)
        self.workers: list[Worker] = []
        self._num_first_workers = num_prefill + num_decode
        for number in range(self._num_first_workers):
            self.add_worker("prefill" if number < num_prefill else "decode")

    @property
    def state(self) -> State:
        states = {worker.client.state for worker in self.workers}
        if self._is_draining:
            return "dead" if states <= {"dead"} else "draining"
        if not self._has_started:
            return "loading"
        if "ready" in states:
            return "ready"
        return "dead" if states <= {"dead"} else "restarting"

    @property
    def info(self) -> EngineInfo | None:
        """What a decode engine serves, with the number of blocks of all engines."""
        infos = tuple(worker.client.info for worker in reversed(self.workers) if worker.client.info is not None)
        if not infos or not self._has_started:
            return None
        if self._merged[0] != infos:  # the same object as long as the engines are the same
            num_blocks = sum(info.num_blocks for info in infos)
            self._merged = infos, msgspec.structs.replace(infos[0], num_blocks=num_blocks)
        return self._merged[1]

    @property
    def tokenizer(self) -> Tokenizer | None:
        return next((worker.client.tokenizer for worker in self.workers if worker.client.tokenizer is not None), None)

    @property
    def num_used_blocks(self) -> int:
        return sum(worker.client.num_used_blocks for worker in self.workers)

    @property
    def last_death(self) -> EngineDied | None:
        deaths = (worker.client.last_death for worker in self.workers if worker.client.state != "ready")
        return next((death for death in deaths if death is not None), None)

    def add_worker(self, role: Role) -> Worker:
        """Return a new worker that the caller must start. It shares the cores with the others."""
        worker = self._make(role)
        self.workers.append(worker)
        return worker

    async def remove_worker(self, worker: Worker) -> None:
        """End a worker that has no requests left."""
        self.workers.remove(worker)
        await worker.client.stop()

    def observe(self, role: Role) -> Observation:
        """Return the work of a role's workers: of prefill workers in prompt tokens, with the tokens that one computes
        in a second as capacity; of decode workers in sequences, with the number that one runs at once."""
        streams = [stream for stream in self._streams.values() if stream.role == role]
        workers = [worker for worker in self.workers if worker.role == role and worker.is_ready]
        if role == "decode":
            capacity = next((worker.client.info.max_num_seqs for worker in workers if worker.client.info), 1)
            sizes = [stream.num_open for stream in streams]
        else:
            rates = (worker.client.prefill_tokens_per_second for worker in workers)
            capacity = max(1, round(max(rates, default=0.0)) or 1000)
            sizes = [len(stream.request.prompt_token_ids) for stream in streams]
        running = sum(size for stream, size in zip(streams, sizes, strict=True) if stream.has_started_there)
        usage = max((worker.client.kv_usage for worker in workers), default=0.0)
        attainment = sum(self._met_slos) / len(self._met_slos) if self._met_slos else 1.0
        return Observation(sum(sizes) - running, running, capacity, usage, attainment)

    def num_desired(self, role: Role) -> int:
        return sum(worker.role == role and not worker.is_leaving for worker in self.workers)

    def num_ready(self, role: Role) -> int:
        return sum(worker.role == role and worker.is_ready for worker in self.workers)

    async def start(self) -> EngineInfo:
        self._loop = asyncio.get_running_loop()
        # One by one: each measures the free memory, and compiles into the cache that the next one reads.
        for worker in list(self.workers):
            await worker.client.start()
        self._has_started = True
        self._notify_state()
        info = self.info
        assert info is not None
        return info

    def _stop_accepting(self) -> None:
        self._is_draining = True
        self._notify_state()

    async def stop(self) -> None:
        self._is_draining = self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(worker.client.stop() for worker in self.workers))
        self._directory.remove()
        self._notify_state()

    def submit(self, request: GenerationRequest) -> RequestStream:
        if self.state != "ready":
            raise self._not_ready()
        if request.publish_as is not None or request.pull is not None:
            raise InvalidRequest(
                "kv_transfer_params is for workers: this server moves keys and values by itself", "kv_transfer_params"
            )
        if request.params.seed is None:
            seed = int.from_bytes(os.urandom(8), signed=True)
            request = msgspec.structs.replace(request, params=replace(request.params, seed=seed))
        key = str(next(self._keys))
        stream = MigratedStream(key, request, self._choose, self._notify_first_token, self._on_end)
        prefill, decode = self._least_loaded("prefill"), self._least_loaded("decode")
        if prefill is not None and decode is not None and not self._ends_with_first_token(request):
            stream.begin(prefill, decode, secrets.token_hex(16))
        else:
            alone = prefill or decode
            if alone is None:
                raise self._not_ready()
            stream.begin_alone(alone)
        self._streams[key] = stream
        return stream

    def is_ready(self) -> tuple[bool, str]:
        if self.state != "ready":
            return False, str(self._not_ready())
        answers = [worker.client.is_ready() for worker in self.workers if worker.is_ready]
        return next((answer for answer in answers if answer[0]), answers[0] if answers else (False, "no engine is up"))

    async def inspect(self, *, verify: bool = True) -> Inspection:
        """Return the sums of all engines' counts. Raises NotReady or EngineDied."""
        found = [
            await worker.client.inspect(verify=verify)
            for worker in self.workers
            if worker.client.state in ("ready", "draining")
        ]
        if not found:
            raise self._not_ready()
        problem = next((one.problem for one in found if one.problem is not None), None)
        names = [name for name in Inspection.__struct_fields__ if name != "problem"]
        return Inspection(**{name: sum(getattr(one, name) for one in found) for name in names}, problem=problem)

    def _ends_with_first_token(self, request: GenerationRequest) -> bool:
        info = self.info
        room = request.params.token_limit
        if info is not None:
            room = min(room, info.max_model_len - len(request.prompt_token_ids))
        return room <= 1

    def _choose(self) -> ProcessClient | None:
        """Return an engine to continue the request of a lost one."""
        return None if self._is_stopping else self._least_loaded("decode") or self._least_loaded("prefill")

    def _least_loaded(self, role: Role) -> ProcessClient | None:
        ready = [worker.client for worker in self.workers if worker.role == role and worker.is_ready]
        return min(ready, key=lambda client: client.load, default=None)

    def _make(self, role: Role) -> Worker:
        taken = {worker.place for worker in self.workers}
        place = next(place for place in itertools.count() if place not in taken)
        client = ProcessClient(
            self._options,
            shared_cores=SharedCores(self._cores_path, role),
            place=WorkerPlace(place, self._num_first_workers),
            **self._limits,
        )
        worker = Worker(next(self._numbers), role, client, place)
        client.observers += [worker.statistics, _Forward(self, worker)]
        return worker

    def _replace(self, worker: Worker) -> None:
        """Start another worker for one that served and is dead."""
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

    def _on_end(self, stream: MigratedStream) -> None:
        if self._streams.pop(stream.key, None) is not None:
            if stream.met_slo is not None:
                self._met_slos.append(stream.met_slo)
            self._notify_finished(stream)

    def _notify_state(self) -> None:
        state = self.state
        if state != self._notified_state:
            self._notified_state = state
            self._notify(lambda observer: observer.on_state(state))

    def _not_ready(self) -> NotReady:
        if not self._has_started:
            return NotReady("the model is being loaded")
        if self._is_draining:
            return NotReady("the server is finishing its last requests", 10)
        return NotReady("no engine is up: they are being restarted")


class _Forward(EngineObserver):
    """Reports the steps and states of one engine to the observers of the pool."""

    def __init__(self, pool: WorkerPool, worker: Worker) -> None:
        self._pool = pool
        self._worker = worker

    def on_step(self, record: StepRecord, finished: float) -> None:
        self._pool._notify(lambda observer: observer.on_step(record, finished))

    def on_shed(self, slo: Slo) -> None:
        self._pool._met_slos.append(False)
        self._pool._notify(lambda observer: observer.on_shed(slo))

    def on_state(self, state: State) -> None:
        self._pool._notify_state()
        if state == "dead":
            self._pool._replace(self._worker)
