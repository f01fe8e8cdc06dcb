"""A simulated cluster: the real scheduler and prefix cache without a model, on a clock that jumps between events.

A step takes the time that a linear cost model gives. Each worker has a machine of its own. With prefill workers, the KV
blocks of a prompt move over a link of the decode worker as the scheduler's chunks complete.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from dispec.bench.cluster_trace import Request
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.block_pool import BlockPool
from dispec.engine.scheduling.scheduler import Scheduler
from dispec.engine.scheduling.scheduler_output import ModelRunnerOutput, SchedulerOutput
from dispec.engine.scheduling.sequence import Sequence as EngineSequence


class StepCost(NamedTuple):
    """Seconds of a step: `base`, and for each prompt token, decoding sequence, and token that decoding attends to."""

    base: float
    prompt_token: float
    sequence: float
    context_token: float

    def seconds(self, step: SchedulerOutput) -> float:
        prompts = [
            scheduled
            for scheduled in step.scheduled_sequences
            if scheduled.num_tokens > 1 or scheduled.start < scheduled.sequence.num_prompt_tokens - 1
        ]
        num_decodes = len(step.scheduled_sequences) - len(prompts)
        context = sum(scheduled.start for scheduled in step.scheduled_sequences)
        prompt_tokens = sum(scheduled.num_tokens for scheduled in prompts)
        return (
            self.base + self.prompt_token * prompt_tokens + self.sequence * num_decodes + self.context_token * context
        )


@dataclass(frozen=True)
class Machine:
    """A worker's machine. kv_bytes: of a token. bandwidth, latency: of its link, in bytes per second and seconds."""

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
    """The times of a request's tokens, in seconds of the trace."""

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
        pool = BlockPool(machine.num_blocks, machine.block_size, key=b"the same in all workers: hashes are compared")
        self.machine = machine
        self.scheduler = Scheduler(pool, machine.max_num_seqs, machine.max_num_batched_tokens)
        self.step: SchedulerOutput | None = None  # the running one
        self.load = 0  # unfinished sequences
        self.link_free_at = 0.0
        self.waiting_transfers: deque[_Transfer] = deque()


class _Transfer(NamedTuple):
    """A prompt that moves from `source`, where the sequence `first` computed it from `began` to `ended`."""

    source: _Worker
    first: EngineSequence
    sequence: EngineSequence
    began: float
    ended: float


class Cluster:
    """`num_prefill` workers compute prompts, `num_decode` workers generate; without prefill workers all do both."""

    def __init__(self, machine: Machine, num_prefill: int, num_decode: int) -> None:
        self._machine = machine
        self._prefill = [_Worker(machine) for _ in range(num_prefill)]
        self._decode = [_Worker(machine) for _ in range(num_decode)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._outcomes: dict[EngineSequence, Outcome] = {}
        self._first_chunk_times: dict[EngineSequence, float] = {}

    def run(self, trace: Sequence[Request]) -> list[Outcome]:
        """Serve all requests. Raises ValueError for one that exceeds the memory of a worker."""
        outcomes = [Outcome(request) for request in trace]
        for number, outcome in enumerate(outcomes):
            self._at(outcome.request.arrival, partial(self._arrive, number, outcome))
        while self._events:
            now, _, event = heapq.heappop(self._events)
            event(now)
        return outcomes

    def _at(self, time: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def _arrive(self, number: int, outcome: Outcome, now: float) -> None:
        request = outcome.request
        worker = self._choose(self._prefill or self._decode, request.prompt)
        sequence = self._sequence(now, number, outcome, 1 if self._prefill else len(request.answer))
        worker.scheduler.add(sequence)
        if self._prefill:
            worker.scheduler.kv_cache.pin(sequence)
        worker.load += 1
        self._start_step(now, worker)

    def _sequence(self, now: float, number: int, outcome: Outcome, max_tokens: int) -> EngineSequence:
        prompt, params = list(outcome.request.prompt), SamplingParams(max_tokens=max_tokens)
        sequence = EngineSequence(
            number, prompt, params, 0, frozenset(), len(prompt) + max_tokens, now, request_id=str(number)
        )
        self._outcomes[sequence] = outcome
        return sequence

    def _choose(self, workers: list[_Worker], prompt: list[int]) -> _Worker:
        """Return the worker with the longest cached prefix, unless it is much busier than the least loaded one."""
        pool, size = workers[0].scheduler.pool, self._machine.block_size
        hashes, parent = [], pool.hash_seed(None)
        for start in range(0, len(prompt) - size + 1, size):
            parent = pool.hash_block(parent, prompt[start : start + size])
            hashes.append(parent)
        least = min(workers, key=lambda worker: worker.load)
        best = max(workers, key=lambda worker: (len(worker.scheduler.pool.find_cached(hashes)), -worker.load))
        return best if best.load <= 1.5 * least.load + 2 else least

    def _start_step(self, now: float, worker: _Worker) -> None:
        if worker.step is not None:
            return
        while worker.waiting_transfers and self._transfer(now, worker, worker.waiting_transfers[0]):
            worker.waiting_transfers.popleft()
        step = worker.scheduler.schedule()
        if step.scheduled_sequences:
            worker.step = step
            self._at(now + worker.machine.cost.seconds(step), partial(self._end_step, worker, step))

    def _end_step(self, worker: _Worker, step: SchedulerOutput, now: float) -> None:
        worker.step = None
        sampled = {}
        for scheduled in step.scheduled_sequences:
            outcome = self._outcomes[scheduled.sequence]
            self._first_chunk_times.setdefault(scheduled.sequence, now)
            if scheduled.samples:
                sampled[scheduled.sequence.id] = [outcome.request.answer[len(outcome.times)]]
        sequences = {scheduled.sequence.request_id: scheduled.sequence for scheduled in step.scheduled_sequences}
        for output in worker.scheduler.commit(step, ModelRunnerOutput(sampled)):
            sequence = sequences[output.request_id]
            outcome = self._outcomes[sequence]
            outcome.times.append(now)
            if len(outcome.times) == 1:
                outcome.num_cached_tokens = sequence.num_cached_tokens or 0
            if output.finish_reason is not None:
                worker.load -= 1
                if worker in self._prefill:
                    self._move(now, worker, sequence)
        self._start_step(now, worker)

    def _move(self, now: float, source: _Worker, first: EngineSequence) -> None:
        """Continue on a decode worker after the first token."""
        outcome = self._outcomes[first]
        request = outcome.request
        if len(request.answer) == 1:
            source.scheduler.kv_cache.unpin(first)
            return
        target = self._choose(self._decode, request.prompt)
        sequence = self._sequence(request.arrival, first.id, outcome, len(request.answer))
        target.scheduler.add_remote([sequence])
        target.load += 1
        target.waiting_transfers.append(_Transfer(source, first, sequence, self._first_chunk_times[first], now))
        self._start_step(now, target)

    def _transfer(self, now: float, worker: _Worker, transfer: _Transfer) -> bool:
        """Start a transfer if there is room. Blocks of earlier chunks have been moving since these were computed."""
        reserved = worker.scheduler.reserve_remote(transfer.sequence)
        if reserved is None:
            return False
        machine = self._machine
        num_cached, table = reserved
        size = (len(table) - num_cached) * machine.block_size * machine.kv_bytes
        last_chunk = min(size, machine.max_num_batched_tokens * machine.kv_bytes)
        start = max(transfer.began if now == transfer.ended else now, worker.link_free_at)
        worker.link_free_at = max(start + size / machine.bandwidth, now + last_chunk / machine.bandwidth)
        self._at(worker.link_free_at + machine.latency, partial(self._end_transfer, worker, transfer))
        return True

    def _end_transfer(self, worker: _Worker, transfer: _Transfer, now: float) -> None:
        transfer.sequence.append(self._outcomes[transfer.sequence].request.answer[0])
        worker.scheduler.start_remote(transfer.sequence, [transfer.sequence])
        transfer.source.scheduler.kv_cache.unpin(transfer.first)
        self._start_step(now, transfer.source)
        self._start_step(now, worker)
