"""A cluster without models: the project's own scheduler and prefix cache, with steps that take what they were measured
to take, on a clock that jumps from event to event.

Each worker has a machine of its own, or all share one with the server's front (`Host`). There three things cost time
that no worker knows of: what the front does for a token and for a request; a core that it takes while workers use them
all; and memory and caches that workers take from each other.
"""

import functools
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dispec.bench.cluster_trace import Request
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.block_pool import BlockPool
from dispec.engine.scheduling.scheduler import Scheduler
from dispec.engine.scheduling.scheduler_output import ModelRunnerOutput, SchedulerOutput
from dispec.engine.scheduling.sequence import Sequence as Running


class StepCost(NamedTuple):
    """Seconds of a step: `base`, and for each token of a prompt, each sequence that decodes, and each token that such a
    sequence attends to."""

    base: float
    prompt_token: float
    sequence: float
    context_token: float

    def of(self, step: SchedulerOutput) -> float:
        prompts = [
            scheduled
            for scheduled in step.scheduled_sequences
            if scheduled.num_tokens > 1 or scheduled.start < scheduled.sequence.num_prompt_tokens - 1
        ]
        decodes = len(step.scheduled_sequences) - len(prompts)
        context = sum(scheduled.start for scheduled in step.scheduled_sequences)
        prompt_tokens = sum(scheduled.num_tokens for scheduled in prompts)
        return self.base + self.prompt_token * prompt_tokens + self.sequence * decodes + self.context_token * context


class Host(NamedTuple):
    """A machine that all workers share, each with `num_threads`, with the front and whoever asks.

    contention: how many times as long a step takes while another worker is in one, for each such worker.
    front_token, front_request: seconds that front and client compute for a token and for a request.
    """

    num_cores: int
    num_threads: int
    contention: float = 1.0
    front_token: float = 0.0
    front_request: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What a worker is. kv_bytes: of a token. bandwidth, latency: of its link, in bytes per second and seconds.

    spread: how many times as long as the line says steps took, of which each simulated step draws one.
    """

    cost: StepCost
    kv_bytes: int
    num_blocks: int = 8192
    block_size: int = 32
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    bandwidth: float = 1e9
    latency: float = 1e-3
    spread: tuple[float, ...] = (1.0,)


@dataclass
class Outcome:
    """When the tokens of a request came, in seconds of the trace."""

    request: Request
    times: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0

    @property
    def ttft(self) -> float:
        return self.times[0] - self.request.arrival

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]


class _Worker:
    def __init__(self, machine: Machine) -> None:
        pool = BlockPool(machine.num_blocks, machine.block_size, key=b"one for all, so that names can be compared")
        self.machine = machine
        self.scheduler = Scheduler(pool, machine.max_num_seqs, machine.max_num_batched_tokens)
        self.step: SchedulerOutput | None = None  # that it is in
        self.left = 0.0  # seconds of it, if nobody were in the way
        self.num_changes = 0  # of when it will end: an end that was foreseen before the last one does not come
        self.load = 0  # sequences that it has not ended
        self.link_is_free = 0.0
        self.arriving: deque[tuple[Running, float, float]] = deque()  # that wait for blocks


class Cluster:
    """num_prefill workers that compute prompts and num_decode that generate; with no prefill workers all do both."""

    def __init__(
        self, machine: Machine, num_prefill: int, num_decode: int, host: Host | None = None, seed: int = 0
    ) -> None:
        self._machine = machine
        self._host = host
        self._draw = random.Random(seed)
        self._looked = 0.0  # when it was last noted how far the steps are
        self._front_is_free = 0.0
        self._prefill = [_Worker(machine) for _ in range(num_prefill)]
        self._decode = [_Worker(machine) for _ in range(num_decode)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._outcomes: dict[Running, Outcome] = {}
        self._first_chunk: dict[Running, float] = {}
        self._unpin: dict[Running, Callable[[float], None]] = {}  # what to do with a prompt's blocks once copied

    def run(self, trace: Sequence[Request]) -> list[Outcome]:
        """All requests to their ends. Raises ValueError for one that no worker could ever hold."""
        outcomes = [Outcome(request) for request in trace]
        for number, outcome in enumerate(outcomes):
            self._at(outcome.request.arrival, functools.partial(self._receive, number, outcome))
        while self._events:
            now, _, event = heapq.heappop(self._events)
            event(now)
        return outcomes

    def _at(self, time: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def _receive(self, number: int, outcome: Outcome, now: float) -> None:
        seconds = self._host.front_request if self._host else 0.0
        self._at(self._front(now, seconds), functools.partial(self._arrive, number, outcome))

    def _front(self, now: float, seconds: float) -> float:
        """When the front is done with something that takes so long. Without a core to spare somebody waits for it."""
        self._pass_time(now)
        self._front_is_free = max(now, self._front_is_free) + seconds
        busy = [worker for worker in (*self._prefill, *self._decode) if worker.step is not None]
        if self._host is not None and seconds and len(busy) * self._host.num_threads >= self._host.num_cores:
            for worker in busy:
                worker.left += seconds / len(busy)
            self._foresee(now)
        return self._front_is_free

    def _arrive(self, number: int, outcome: Outcome, now: float) -> None:
        workers = self._prefill or self._decode
        request = outcome.request
        worker = self._choose(workers, request.prompt)
        sequence = self._sequence(now, number, request, 1 if self._prefill else len(request.answer))
        self._outcomes[sequence] = outcome
        worker.scheduler.add(sequence)
        if self._prefill:
            worker.scheduler.kv_cache.pin(sequence)
        worker.load += 1
        self._wake(now, worker)

    def _sequence(self, now: float, number: int, request: Request, output: int) -> Running:
        params = SamplingParams(max_tokens=output)
        return Running(
            number, list(request.prompt), params, 0, frozenset(), len(request.prompt) + output, now, str(number)
        )

    def _choose(self, workers: list[_Worker], prompt: list[int]) -> _Worker:
        """The one that has most of the prompt, unless it is much busier than the least busy one."""
        pool, size = workers[0].scheduler.pool, self._machine.block_size
        names, parent = [], pool.hash_seed(None)
        for start in range(0, len(prompt) - size + 1, size):
            parent = pool.hash_block(parent, prompt[start : start + size])
            names.append(parent)
        least = min(workers, key=lambda worker: worker.load)
        best = max(workers, key=lambda worker: (len(worker.scheduler.pool.find_cached(names)), -worker.load))
        return best if best.load <= 1.5 * least.load + 2 else least

    def _wake(self, now: float, worker: _Worker) -> None:
        if worker.step is not None:
            return
        while worker.arriving and self._reserve(now, worker, *worker.arriving[0]):
            worker.arriving.popleft()
        step = worker.scheduler.schedule()
        if not step.scheduled_sequences:
            return
        self._pass_time(now)
        worker.step = step
        worker.left = worker.machine.cost.of(step) * self._draw.choice(worker.machine.spread)
        self._foresee(now, worker)

    def _slowness(self) -> float:
        """Seconds that a second of a step takes now."""
        others = sum(worker.step is not None for worker in (*self._prefill, *self._decode)) - 1
        return 1.0 + (self._host.contention - 1.0) * max(0, others) if self._host is not None else 1.0

    def _pass_time(self, now: float) -> None:
        """Note how far all steps are, before it changes how fast they are."""
        if self._host is not None:
            done = (now - self._looked) / self._slowness()
            for worker in (*self._prefill, *self._decode):
                worker.left -= done
            self._looked = now

    def _foresee(self, now: float, started: _Worker | None = None) -> None:
        """Say when steps end. On a shared machine one that starts or ends changes that for all."""
        workers = (*self._prefill, *self._decode) if self._host is not None else (started,)
        slowness = self._slowness()
        for worker in workers:
            if worker is not None and worker.step is not None:
                worker.num_changes += 1
                end = functools.partial(self._end_step, worker, worker.num_changes)
                self._at(now + max(0.0, worker.left) * slowness, end)

    def _end_step(self, worker: _Worker, num_changes: int, now: float) -> None:
        if num_changes != worker.num_changes or worker.step is None:
            return
        self._pass_time(now)
        step, worker.step = worker.step, None
        if self._host is not None:
            self._foresee(now)
        chosen = {}
        for scheduled in step.scheduled_sequences:
            outcome = self._outcomes[scheduled.sequence]
            self._first_chunk.setdefault(scheduled.sequence, now)
            if scheduled.samples:
                chosen[scheduled.sequence.id] = [outcome.request.answer[len(outcome.times)]]
        outputs = worker.scheduler.commit(step, ModelRunnerOutput(chosen))
        seconds = self._host.front_token * len(outputs) if self._host else 0.0
        told = max(now, self._front_is_free) + seconds
        sequences = {scheduled.sequence.request_id: scheduled.sequence for scheduled in step.scheduled_sequences}
        for output in outputs:
            sequence = sequences[output.request_id]
            outcome = self._outcomes[sequence]
            outcome.times.append(told)
            if len(outcome.times) == 1:
                outcome.num_cached_tokens = sequence.num_cached_tokens or 0
            if output.finish_reason is not None:
                worker.load -= 1
                if worker in self._prefill:
                    self._hand_over(now, worker, sequence)
        self._wake(now, worker)  # which does not wait until anybody has been told
        self._front(now, seconds)

    def _hand_over(self, now: float, source: _Worker, first: Running) -> None:
        outcome = self._outcomes[first]
        request = outcome.request
        began = self._first_chunk[first]

        def unpin(end: float) -> None:
            source.scheduler.kv_cache.unpin(first)
            self._wake(end, source)

        if len(request.answer) == 1:
            unpin(now)
            return
        target = self._choose(self._decode, request.prompt)
        sequence = self._sequence(now, first.id, request, len(request.answer))
        sequence.arrival_time = request.arrival
        self._outcomes[sequence] = outcome
        target.scheduler.add_remote([sequence])
        target.load += 1
        self._first_chunk[sequence] = began
        self._unpin[sequence] = unpin
        target.arriving.append((sequence, began, now))
        self._wake(now, target)

    def _reserve(self, now: float, worker: _Worker, sequence: Running, began: float, ended: float) -> bool:
        """Begin a transfer, if there is room. What was computed in earlier chunks has been on its way since then."""
        reserved = worker.scheduler.reserve_remote(sequence)
        if reserved is None:
            return False
        machine = self._machine
        num_found, table = reserved
        size = (len(table) - num_found) * machine.block_size * machine.kv_bytes
        last = min(size, machine.max_num_batched_tokens * machine.kv_bytes)
        start = max(began if now == ended else now, worker.link_is_free)
        done = max(start + size / machine.bandwidth, now + last / machine.bandwidth) + machine.latency
        worker.link_is_free = max(worker.link_is_free, done - machine.latency)
        done = max(done, self._outcomes[sequence].times[0])  # it goes on when the front has told it the first token
        self._at(done, lambda end: self._arrived(end, worker, sequence))
        return True

    def _arrived(self, now: float, worker: _Worker, sequence: Running) -> None:
        sequence.append(self._outcomes[sequence].request.answer[0])
        worker.scheduler.start_remote(sequence, [sequence])
        self._unpin.pop(sequence)(now)
        self._wake(now, worker)
