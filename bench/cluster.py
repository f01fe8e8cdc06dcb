"""A cluster without models: the project's own scheduler and prefix cache, with steps that take what they were measured
to take, on a clock that jumps from event to event.
"""

import functools
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.cluster_trace import Request
from engine.block_pool import BlockPool
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence as Running
from engine.step import Step, StepResult


class StepCost(NamedTuple):
    """Seconds of a step: `base`, and for each token of a prompt, each sequence that decodes, and each token that such a
    sequence attends to."""

    base: float
    prompt_token: float
    sequence: float
    context_token: float

    def of(self, step: Step) -> float:
        prompts = [
            work for work in step.work if work.num_tokens > 1 or work.start < work.sequence.num_prompt_tokens - 1
        ]
        decodes = len(step.work) - len(prompts)
        context = sum(work.start for work in step.work)
        prompt_tokens = sum(work.num_tokens for work in prompts)
        return self.base + self.prompt_token * prompt_tokens + self.sequence * decodes + self.context_token * context


@dataclass(frozen=True)
class Machine:
    """What a worker is. kv_bytes: of a token. bandwidth, latency: of its link, in bytes per second and seconds."""

    cost: StepCost
    kv_bytes: int
    num_blocks: int = 8192
    block_size: int = 32
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    bandwidth: float = 1e9
    latency: float = 1e-3


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
        self.is_busy = False
        self.load = 0  # sequences that it has not ended
        self.link_is_free = 0.0
        self.arriving: deque[tuple[Running, float, float]] = deque()  # that wait for blocks


class Cluster:
    """num_prefill workers that compute prompts and num_decode that generate; with no prefill workers all do both."""

    def __init__(self, machine: Machine, num_prefill: int, num_decode: int) -> None:
        self._machine = machine
        self._prefill = [_Worker(machine) for _ in range(num_prefill)]
        self._decode = [_Worker(machine) for _ in range(num_decode)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._outcomes: dict[Running, Outcome] = {}
        self._first_chunk: dict[Running, float] = {}
        self._given_back: dict[Running, Callable[[float], None]] = {}  # what to do with a prompt's blocks once copied

    def run(self, trace: Sequence[Request]) -> list[Outcome]:
        """All requests to their ends. Raises ValueError for one that no worker could ever hold."""
        outcomes = [Outcome(request) for request in trace]
        for number, outcome in enumerate(outcomes):
            self._at(outcome.request.arrival, functools.partial(self._arrive, number, outcome))
        while self._events:
            now, _, event = heapq.heappop(self._events)
            event(now)
        return outcomes

    def _at(self, time: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def _arrive(self, number: int, outcome: Outcome, now: float) -> None:
        workers = self._prefill or self._decode
        request = outcome.request
        worker = self._choose(workers, request.prompt)
        sequence = self._sequence(now, number, request, 1 if self._prefill else len(request.answer))
        self._outcomes[sequence] = outcome
        worker.scheduler.add(sequence)
        if self._prefill:
            worker.scheduler.keep(sequence)
        worker.load += 1
        self._wake(now, worker)

    def _sequence(self, now: float, number: int, request: Request, output: int) -> Running:
        params = SamplingParams(max_tokens=output)
        return Running(number, list(request.prompt), params, 0, frozenset(), len(request.prompt) + output, now)

    def _choose(self, workers: list[_Worker], prompt: list[int]) -> _Worker:
        """The one that has most of the prompt, unless it is much busier than the least busy one."""
        pool, size = workers[0].scheduler.pool, self._machine.block_size
        names, parent = [], pool.root_name(None)
        for start in range(0, len(prompt) - size + 1, size):
            parent = pool.name(parent, prompt[start : start + size])
            names.append(parent)
        least = min(workers, key=lambda worker: worker.load)
        best = max(workers, key=lambda worker: (len(worker.scheduler.pool.find(names)), -worker.load))
        return best if best.load <= 1.5 * least.load + 2 else least

    def _wake(self, now: float, worker: _Worker) -> None:
        if worker.is_busy:
            return
        while worker.arriving and self._reserve(now, worker, *worker.arriving[0]):
            worker.arriving.popleft()
        step = worker.scheduler.schedule()
        if not step.work:
            return
        worker.is_busy = True
        self._at(now + worker.machine.cost.of(step), lambda end: self._end_step(end, worker, step))

    def _end_step(self, now: float, worker: _Worker, step: Step) -> None:
        worker.is_busy = False
        chosen = {}
        for work in step.work:
            outcome = self._outcomes[work.sequence]
            self._first_chunk.setdefault(work.sequence, now)
            if work.samples:
                chosen[work.sequence.id] = [outcome.request.answer[len(outcome.times)]]
        for output in worker.scheduler.commit(step, StepResult(chosen)):
            outcome = self._outcomes[output.sequence]
            outcome.times.append(now)
            if len(outcome.times) == 1:
                outcome.num_cached_tokens = output.sequence.num_cached_tokens or 0
            if output.finish_reason is not None:
                worker.load -= 1
                if self._prefill and output.sequence.kept_blocks is not None:
                    self._hand_over(now, worker, output.sequence)
        self._wake(now, worker)

    def _hand_over(self, now: float, source: _Worker, first: Running) -> None:
        outcome = self._outcomes[first]
        request, kept = outcome.request, first.kept_blocks
        assert kept is not None
        began = self._first_chunk[first]

        def give_back(end: float) -> None:
            first.kept_blocks = None
            source.scheduler.give_back(kept)
            self._wake(end, source)

        if len(request.answer) == 1:
            give_back(now)
            return
        target = self._choose(self._decode, request.prompt)
        sequence = self._sequence(now, first.id, request, len(request.answer))
        sequence.arrival_time = request.arrival
        self._outcomes[sequence] = outcome
        target.scheduler.expect([sequence])
        target.load += 1
        self._first_chunk[sequence] = began
        self._given_back[sequence] = give_back
        target.arriving.append((sequence, began, now))
        self._wake(now, target)

    def _reserve(self, now: float, worker: _Worker, sequence: Running, began: float, ended: float) -> bool:
        """Begin a transfer, if there is room. What was computed in earlier chunks has been on its way since then."""
        reserved = worker.scheduler.reserve(sequence)
        if reserved is None:
            return False
        machine = self._machine
        num_found, table = reserved
        size = (len(table) - num_found) * machine.block_size * machine.kv_bytes
        last = min(size, machine.max_num_batched_tokens * machine.kv_bytes)
        start = max(began if now == ended else now, worker.link_is_free)
        done = max(start + size / machine.bandwidth, now + last / machine.bandwidth) + machine.latency
        worker.link_is_free = max(worker.link_is_free, done - machine.latency)
        self._at(done, lambda end: self._arrived(end, worker, sequence))
        return True

    def _arrived(self, now: float, worker: _Worker, sequence: Running) -> None:
        sequence.append(self._outcomes[sequence].request.answer[0])
        worker.scheduler.arrive(sequence, [sequence])
        self._given_back.pop(sequence)(now)
        self._wake(now, worker)
