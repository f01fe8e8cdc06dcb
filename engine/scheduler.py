"""Continuous batching: which sequences compute how many tokens in the next step (Orca, OSDI 2022).

A sequence whose prompt is long computes it in chunks under the step's token budget, beside the sequences that
decode (Sarathi-Serve, arXiv:2403.02310). When blocks run out, the youngest sequence gives its own back and is
computed again later; nothing accepted is lost.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.sequence import FinishReason, Sequence, Status


@dataclass(frozen=True, slots=True)
class Work:
    """The next `num_tokens` uncomputed tokens of a sequence."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether this computes the sequence's last token, so that the next one can be chosen."""
        return self.num_tokens == self.sequence.num_uncomputed_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass of the model computes; empty when nothing can run."""

    work: tuple[Work, ...]
    num_preempted: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(work.num_tokens for work in self.work)


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What a step did to one sequence: a new token, an end, or both."""

    sequence: Sequence
    token_id: int | None
    finish_reason: FinishReason | None


class Scheduler:
    """Owns the queue, the running set and the blocks; knows nothing of tensors."""

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) is below max_num_seqs ({max_num_seqs}):"
                " every running sequence needs a token a step"
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission: the youngest is the last

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ValueError if the whole pool could not hold it at its longest."""
        needed = self.pool.blocks_for(sequence.max_len)
        if needed > self.pool.num_usable:
            raise ValueError(
                f"a sequence of {sequence.max_len} tokens needs {needed} KV blocks, the cache has"
                f" {self.pool.num_usable}: raise kv_cache_memory or lower max_model_len"
            )
        self.waiting.append(sequence)

    def schedule(self) -> Step:
        """Choose the next step's work and give it blocks: decodes, then prompts under way, then new ones."""
        budget = self.max_num_batched_tokens
        work: dict[Sequence, Work] = {}
        num_preempted = 0
        decoding = [sequence for sequence in self.running if sequence.num_uncomputed_tokens == 1]
        prefilling = [sequence for sequence in self.running if sequence.num_uncomputed_tokens > 1]
        for sequence in decoding + prefilling:
            if budget == 0:
                break
            if sequence.status is not Status.RUNNING:
                continue  # preempted on behalf of an older one
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            while not self._grow(sequence, num_tokens):
                victim = self.running[-1]
                self._preempt(victim)
                num_preempted += 1
                undone = work.pop(victim, None)
                budget += undone.num_tokens if undone else 0
                if victim is sequence:
                    break
            else:
                work[sequence] = Work(sequence, num_tokens)
                budget -= num_tokens
        # A preemption means that memory is short: whoever is admitted now would be the next victim.
        while self.waiting and budget and len(self.running) < self.max_num_seqs and not num_preempted:
            sequence = self.waiting[0]
            # The whole prompt must fit now, and each running sequence be able to grow once: fewer preemptions.
            if self.pool.blocks_for(len(sequence.token_ids)) + len(self.running) > self.pool.num_free and self.running:
                break
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            if not self._grow(sequence, num_tokens):
                break
            self.waiting.popleft()
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            work[sequence] = Work(sequence, num_tokens)
            budget -= num_tokens
        return Step(tuple(work.values()), num_preempted)

    def commit(self, step: Step, sampled: Mapping[int, int]) -> list[TokenOutput]:
        """Record a step that ran: `sampled` gives the new token of each sequence, by id, whose work `samples`."""
        outputs = []
        for work in step.work:
            sequence = work.sequence
            if sequence.status is not Status.RUNNING:
                continue  # aborted while the step ran
            samples = work.samples
            sequence.num_computed_tokens += work.num_tokens
            if not samples:
                continue
            token_id = sampled[sequence.id]
            sequence.append(token_id)
            if sequence.finish_reason is not None:
                self._release(sequence)
            outputs.append(TokenOutput(sequence, token_id, sequence.finish_reason))
        if any(output.finish_reason for output in outputs):
            self.running = [sequence for sequence in self.running if sequence.status is Status.RUNNING]
        return outputs

    def abort(self, sequence: Sequence) -> None:
        """End a sequence wherever it is and free what it holds. Ending it twice does nothing."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        sequence.finish_reason = "abort"
        self._release(sequence)

    def check(self) -> None:
        """Prove that every block in use belongs to a running sequence. Raises AssertionError."""
        assert all(not sequence.block_table for sequence in self.waiting), "a waiting sequence holds blocks"
        self.pool.check(sequence.block_table for sequence in self.running)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence the blocks that `num_tokens` more tokens need, or nothing."""
        needed = self.pool.blocks_for(sequence.num_computed_tokens + num_tokens) - len(sequence.block_table)
        if needed > self.pool.num_free:
            return False
        if needed > 0:
            sequence.block_table += self.pool.allocate(needed)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.status = Status.FINISHED
