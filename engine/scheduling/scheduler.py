"""Continuous batching: which sequences compute how many tokens in the next step (Orca, OSDI 2022).

A long prompt is computed in chunks under the step's token budget, beside the sequences that decode (Sarathi-Serve,
arXiv:2403.02310). Prefixes that are still in the cache are not computed again. When blocks run out, the sequence that
is last in rank is preempted: it frees its blocks and is computed again later, mostly from its cached blocks. It keeps
its tokens.

A sequence's rank is fixed: its arrival time, plus the seconds that it can wait (`Sequence.slack`), plus a delay for
each step of priority. A lower priority number goes first, first come first served within it, and a sequence that has
waited long enough goes before later ones. The running sequence that is first in rank can always take the blocks it
needs, so there is always progress.
"""

from bisect import insort
from collections.abc import Sequence as Series
from dataclasses import dataclass, field

from dispec.engine.scheduling.block_pool import BlockPool
from dispec.engine.scheduling.kv_cache_manager import KVCacheManager
from dispec.engine.scheduling.scheduler_output import (
    ModelRunnerOutput,
    ScheduledSequence,
    SchedulerOutput,
    append_sampled,
)
from dispec.engine.scheduling.sequence import Sequence, Status
from dispec.engine.scheduling.token_output import FinishReason, TokenLogprobs, TokenOutput


@dataclass(slots=True)
class _StepPlan:
    """A step that is being scheduled.

    budget: tokens that it can still take. max_chunk: most prompt tokens of one sequence.
    """

    budget: int
    max_chunk: int
    scheduled: dict[Sequence, ScheduledSequence] = field(default_factory=dict)
    copies: dict[Sequence, tuple[int, int]] = field(default_factory=dict)
    num_preempted: int = 0


class Scheduler:
    """Owns the queue and the running sequences; knows nothing of tensors.

    max_num_seqs: most sequences that run at once.
    max_num_batched_tokens: most tokens of a step.
    max_prefill_chunk: most prompt tokens of one sequence in a step, and most tokens of a step with prompts and decodes,
        where prompts have at least half of them.
    max_lone_prefill_chunk: most prompt tokens of a sequence in a step while no other sequence runs or waits.
    priority_aging: seconds of waiting that make up for one step of priority.
    enable_prefix_caching: as in `KVCacheManager`.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        *,
        max_prefill_chunk: int | None = None,
        max_lone_prefill_chunk: int | None = None,
        priority_aging: float = 60.0,
        enable_prefix_caching: bool = True,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "each running sequence takes a token of every step"
        self.pool = pool
        self.kv_cache = KVCacheManager(pool, enable_prefix_caching)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_chunk = max_prefill_chunk or max_num_batched_tokens
        self.max_lone_prefill_chunk = max_lone_prefill_chunk or self.max_prefill_chunk
        self.priority_aging = priority_aging
        self.waiting: list[Sequence] = []  # in order of rank
        self.running: list[Sequence] = []  # in order of admission
        self.waiting_for_remote: list[Sequence] = []  # their prompts are computed by other engines
        self._remote_ready: list[Sequence] = []  # all their blocks are here; they wait for a place in `running`
        self._num_forks = 0  # sequences in the `forks` of others, which are in none of the lists above

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._remote_ready)

    @property
    def num_waiting(self) -> int:
        """Number of sequences that do not run yet, forks included."""
        return len(self.waiting) + len(self.waiting_for_remote) + len(self._remote_ready) + self._num_forks

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence and its forks. Raises ValueError if the whole pool could not hold it at its longest."""
        self.kv_cache.check_fits(sequence)
        self._num_forks += len(sequence.forks)
        self._enqueue(sequence)

    def add_remote(self, choices: Series[Sequence]) -> None:
        """Register choices for which another engine computes the prompt. Raises ValueError as `add`."""
        self.kv_cache.check_fits(choices[0])
        for choice in choices:
            choice.status = Status.WAITING_FOR_REMOTE_KV
        self.waiting_for_remote += choices

    def reserve_remote(self, sequence: Sequence) -> tuple[int, list[int]] | None:
        """Reserve blocks for the prompt of a sequence from `add_remote`.

        Returns how many leading blocks are cached here, and the block table; None without room. The blocks stay
        reserved until `start_remote` or `kv_cache.free_remote`: a transfer may write to them even after the sequence.
        """
        return self.kv_cache.reserve_remote(sequence, len(self.running))

    def start_remote(self, sequence: Sequence, choices: Series[Sequence]) -> None:
        """Run `choices` from the filled blocks reserved for `sequence`; without choices the blocks are freed."""
        self.kv_cache.take_remote(sequence, choices)
        for choice in choices:
            self.waiting_for_remote.remove(choice)
            self._remote_ready.append(choice)

    def recompute(self, choices: Series[Sequence]) -> None:
        """Queue choices from `add_remote` to compute their prompt here, once for all without an output token."""
        for choice in choices:
            self.waiting_for_remote.remove(choice)
            choice.num_cached_tokens = None
            choice.status = Status.WAITING
        without_output = [choice for choice in choices if not choice.num_output_tokens]
        if without_output:
            first, *first.forks = without_output
            self._num_forks += len(first.forks)
            self._enqueue(first)
        for choice in choices:
            if choice.num_output_tokens:
                self._enqueue(choice)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's sequences and give them blocks: decodes, then prompts under way, then new ones.

        The step's tokens count as computed at once, so every step must be committed, in order.
        """
        is_alone = len(self.running) + len(self.waiting) + len(self._remote_ready) == 1
        max_chunk = self.max_lone_prefill_chunk if is_alone else self.max_prefill_chunk
        plan = _StepPlan(self.max_num_batched_tokens, max_chunk)
        while self._remote_ready and len(self.running) < self.max_num_seqs:
            self._remote_ready[0].status = Status.RUNNING
            self.running.append(self._remote_ready.pop(0))
        self._schedule_running(plan)
        num_running, num_cached_tokens = len(self.running), 0
        # A preemption means that memory is short: a sequence that is admitted now would be preempted next.
        while self.waiting and plan.budget and len(self.running) < self.max_num_seqs and not plan.num_preempted:
            sequence = self.waiting[0]
            if sequence.num_pending_tokens or not self.kv_cache.admit(sequence, len(self.running)):
                break
            self.waiting.pop(0)
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            num_cached_tokens += sequence.num_computed_tokens
            num_tokens = min(sequence.num_uncomputed_tokens, plan.max_chunk, plan.budget)
            has_grown = self.kv_cache.grow(sequence, num_tokens, plan.copies)
            assert has_grown, "a sequence was admitted without room"
            self._add_to_step(plan, sequence, num_tokens)
        return SchedulerOutput(
            tuple(plan.scheduled.values()),
            tuple(plan.copies.values()),
            plan.num_preempted,
            len(self.running) - num_running,
            num_cached_tokens,
        )

    def commit(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[TokenOutput]:
        """Record a step that ran: register the blocks that it filled, and append the tokens that it sampled."""
        outputs: list[TokenOutput] = []
        ended = False
        block_size, pins_blocks = self.pool.block_size, self.kv_cache.holds_remote_blocks
        running, finished = Status.RUNNING, Status.FINISHED
        for sequence, start, num_tokens, samples, num_draft_tokens in step.scheduled_sequences:
            if sequence.status is finished:
                continue  # ended while the step ran
            end = start + num_tokens
            # A sequence that was preempted while the step ran has no blocks left, but its token is kept.
            holds_blocks = sequence.status is running and sequence.num_computed_tokens >= end
            token_ids = result.token_ids[sequence.id] if samples else ()
            if num_draft_tokens:
                num_rejected = num_draft_tokens + 1 - len(token_ids)
                end -= num_rejected
                if holds_blocks:
                    sequence.num_computed_tokens -= num_rejected
            if holds_blocks:
                if end // block_size > sequence.num_registered_blocks:
                    self.kv_cache.register(sequence, end, token_ids)
                if pins_blocks:
                    self.kv_cache.pin_filled(sequence, end)
            if sequence.params.prompt_logprobs is not None:
                num_known = len(sequence.prompt_logprobs)
                if start <= num_known:  # after a preemption, some are computed again
                    found = result.prompt_logprobs.get(sequence.id, [])
                    sequence.prompt_logprobs += found[num_known - start :]
            if not samples:
                continue
            if sequence.forks:
                self._start_forks(sequence, holds_blocks)
            sequence.num_pending_tokens -= 1
            logprobs = result.logprobs[sequence.id] if sequence.params.logprobs is not None else None
            if num_draft_tokens:
                _append_verified(sequence, token_ids, logprobs, num_draft_tokens, outputs)
            else:
                outputs += append_sampled(sequence, token_ids[0], None if logprobs is None else logprobs[0])
            if len(sequence.token_ids) + sequence.num_pending_tokens <= sequence.num_computed_tokens:
                self._compute_again(sequence)
            if sequence.finish_reason is not None:
                if sequence.status is Status.WAITING:
                    self.waiting.remove(sequence)
                ended = True
                self._release(sequence)
        if ended:
            self.running = [sequence for sequence in self.running if sequence.status is Status.RUNNING]
        return outputs

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it is and free what it holds; its forks go on. Ending it twice does nothing."""
        if sequence.status is Status.FINISHED:
            return
        parent = next((other for other in sequence.choices if sequence in other.forks), None)
        if parent is not None:
            parent.forks.remove(sequence)
            self._num_forks -= 1
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.WAITING_FOR_REMOTE_KV:
            (self._remote_ready if sequence in self._remote_ready else self.waiting_for_remote).remove(sequence)
        else:
            self.running.remove(sequence)
        if sequence.forks:
            first, *first.forks = sequence.forks
            sequence.forks = []
            self._num_forks -= 1
            self._enqueue(first)
        sequence.finish_reason = reason
        self._release(sequence)

    def reset(self) -> list[Sequence]:
        """Preempt all running sequences, and return them. Steps under way are discarded: they must not be committed.

        The sequences keep their tokens.
        """
        running = list(self.running)
        for sequence in running:
            self._preempt(sequence)
        for sequence in self.waiting:
            sequence.num_pending_tokens = 0
            sequence.draft.num_tokens = 0
        return running

    def isolate(self, sequence: Sequence) -> list[Sequence]:
        """Remove all other sequences from the queue; returns them, for `requeue`."""
        others = [other for other in self.waiting if other is not sequence]
        self.waiting = [sequence]
        return others

    def requeue(self, sequences: list[Sequence]) -> None:
        """Put sequences that `isolate` removed back into the queue."""
        for sequence in sequences:
            self._enqueue(sequence)

    def check(self) -> None:
        """Prove that the lists, statuses and blocks of all sequences agree. Raises AssertionError."""
        forks = [fork for queue in (self.waiting, self.running) for sequence in queue for fork in sequence.forks]
        assert len(forks) == self._num_forks, "forks are miscounted"
        for sequences, status in (
            ([*self.waiting, *forks], Status.WAITING),
            (self.running, Status.RUNNING),
            ([*self.waiting_for_remote, *self._remote_ready], Status.WAITING_FOR_REMOTE_KV),
        ):
            assert all(sequence.status is status for sequence in sequences), f"one of them is not {status.value}"
        for sequence in (*self.waiting, *forks, *self.waiting_for_remote):
            assert not sequence.block_table, f"a sequence that is {sequence.status.value} has blocks"
        ranks = [self._rank(sequence) for sequence in self.waiting]
        assert ranks == sorted(ranks), "the queue is out of order"
        self.kv_cache.check((*self.running, *self._remote_ready))

    def _rank(self, sequence: Sequence) -> tuple[float, int]:
        return sequence.arrival_time + sequence.slack + sequence.priority * self.priority_aging, sequence.id

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=self._rank)

    def _schedule_running(self, plan: _StepPlan) -> None:
        running = Status.RUNNING
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            num_tokens = len(sequence.token_ids) + sequence.num_pending_tokens - sequence.num_computed_tokens
            if num_tokens == 1:
                if sequence.can_continue:
                    decoding.append(sequence)
            elif num_tokens > 1:
                prefilling.append(sequence)
        prefilling.sort(key=self._rank)
        num_others = len(decoding)
        for sequence in decoding:
            if plan.budget == 0:
                return
            num_others -= 1
            if sequence.status is not running:
                continue  # preempted for another one
            # Draft tokens take the budget that is left by the other sequences' own tokens, and preempt no sequence.
            if sequence.draft.num_tokens:
                num_draft_tokens = _num_draft_tokens(sequence, plan.budget - 1 - num_others)
                if num_draft_tokens and self.kv_cache.grow(sequence, 1 + num_draft_tokens, plan.copies):
                    self._add_to_step(plan, sequence, 1 + num_draft_tokens, num_draft_tokens)
                    continue
            if self.kv_cache.grow(sequence, 1, plan.copies):
                self._add_to_step(plan, sequence, 1)
            else:
                self._schedule_or_preempt(plan, sequence, 1)
        if num_decoded := self.max_num_batched_tokens - plan.budget:
            # All prompts together delay the decodes by one chunk, which the decodes are a part of: with 32 decodes
            # beside it, a chunk of 2048 tokens would be padded to 3072 on CUDA.
            chunk = self.max_prefill_chunk
            plan.budget = min(plan.budget, max(chunk - num_decoded, -(-chunk // 2)))
        for sequence in prefilling:
            if plan.budget == 0:
                return
            if sequence.status is Status.RUNNING:
                num_tokens = min(sequence.num_uncomputed_tokens, plan.max_chunk, plan.budget)
                self._schedule_or_preempt(plan, sequence, num_tokens)

    def _schedule_or_preempt(self, plan: _StepPlan, sequence: Sequence, num_tokens: int) -> None:
        """Schedule a running sequence, and preempt those that are last in rank until there are blocks for it."""
        while not self.kv_cache.grow(sequence, num_tokens, plan.copies):
            victim = max(self.running, key=self._rank)
            undone = plan.scheduled.pop(victim, None)
            plan.copies.pop(victim, None)
            plan.num_preempted += 1
            if undone is not None:
                plan.budget += undone.num_tokens
                victim.num_pending_tokens -= undone.samples
            self._preempt(victim)
            if victim is sequence:
                return
        self._add_to_step(plan, sequence, num_tokens)

    def _add_to_step(self, plan: _StepPlan, sequence: Sequence, num_tokens: int, num_draft_tokens: int = 0) -> None:
        """Add a sequence with allocated blocks to the step."""
        start = sequence.num_computed_tokens
        samples = start + num_tokens - num_draft_tokens == len(sequence.token_ids) + sequence.num_pending_tokens
        sequence.num_computed_tokens = start + num_tokens
        sequence.num_pending_tokens += samples
        plan.scheduled[sequence] = ScheduledSequence(sequence, start, num_tokens, samples, num_draft_tokens)
        plan.budget -= num_tokens

    def _compute_again(self, sequence: Sequence) -> None:
        """Compute a sequence's last token again: its grammar has dropped the token after it."""
        if sequence.status is Status.RUNNING:
            self.kv_cache.truncate(sequence, len(sequence.token_ids) - 1)

    def _start_forks(self, sequence: Sequence, holds_blocks: bool) -> None:
        """Run the forks of a sequence that has computed its prompt, or queue those without blocks or place."""
        for fork in sequence.forks:
            if not holds_blocks or len(self.running) >= self.max_num_seqs:
                self._enqueue(fork)  # it will find the full blocks in the cache
                continue
            self.kv_cache.fork(sequence, fork)
            fork.status = Status.RUNNING
            self.running.append(fork)
        self._num_forks -= len(sequence.forks)
        sequence.forks = []

    def _preempt(self, sequence: Sequence) -> None:
        """Free a running sequence's blocks and queue it again."""
        self.running.remove(sequence)
        self.kv_cache.free(sequence)
        sequence.num_computed_tokens = sequence.num_forced_tokens = 0
        sequence.num_registered_blocks = 0
        self._enqueue(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.kv_cache.free(sequence)
        sequence.status = Status.FINISHED


def _num_draft_tokens(sequence: Sequence, budget: int) -> int:
    """Return the number of draft tokens that the sequence's next step verifies; none is past its end."""
    if sequence.num_pending_tokens:
        return 0
    num_left = sequence.max_len - len(sequence.token_ids) - 1
    return max(0, min(sequence.draft.num_tokens, num_left, budget))


def _append_verified(
    sequence: Sequence,
    token_ids: Series[int],
    logprobs: Series[TokenLogprobs] | None,
    num_draft_tokens: int,
    outputs: list[TokenOutput],
) -> None:
    """Append accepted draft tokens and the token after them up to the sequence's end, each with an output."""
    num_accepted = len(token_ids) - 1
    num_rejected = num_draft_tokens - num_accepted
    size = len(sequence.token_ids)
    for index, token_id in enumerate(token_ids):
        if index < len(sequence.token_ids) - size:
            continue  # a token before it has forced it, and the step's masks have, too
        token_logprobs = logprobs[index] if logprobs is not None else None
        new = append_sampled(sequence, token_id, token_logprobs, num_accepted, num_rejected)
        outputs += new
        if sequence.finish_reason is not None or not new:
            return
        num_accepted = num_rejected = 0  # they count once, with the step's first token
