"""Continuous batching: which sequences compute how many tokens in the next step (Orca, OSDI 2022).

A sequence whose prompt is long computes it in chunks under the step's token budget, beside the sequences that
decode (Sarathi-Serve, arXiv:2403.02310). Prefixes that are still in the cache are not computed again. When blocks
run out, the sequence that is last in rank gives its own back and is computed again later, mostly from what it left
in the cache; nothing accepted is lost.

Everybody has one rank for life: the time of arrival, plus what it can wait (`Sequence.slack`), plus a delay for each
step of priority. So a lower number goes first, first come first served within it, and whoever has waited long enough
goes before those who came after. The
running sequence that is first in rank can always take the blocks it needs, so there is always progress.
"""

from bisect import insort
from collections.abc import Sequence as Series

from dispec.engine.scheduling.block_pool import BlockPool
from dispec.engine.scheduling.scheduler_output import (
    ModelRunnerOutput,
    ScheduledSequence,
    SchedulerOutput,
    TokenOutput,
    last_token_output,
)
from dispec.engine.scheduling.sequence import FinishReason, Sequence, Status


class Scheduler:
    """Owns the queue, the running set and the blocks; knows nothing of tensors.

    max_num_seqs: most sequences that run at once.
    max_num_batched_tokens: most tokens of a step.
    max_prefill_chunk: most prompt tokens of one sequence in a step.
    priority_aging: seconds of waiting that make up for one step of priority.
    enable_prefix_caching: look for prefixes in the cache, and leave one's own there.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        *,
        max_prefill_chunk: int | None = None,
        priority_aging: float = 60.0,
        enable_prefix_caching: bool = True,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) is below max_num_seqs ({max_num_seqs}):"
                " every running sequence needs a token a step"
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_chunk = max_prefill_chunk or max_num_batched_tokens
        self.priority_aging = priority_aging
        self.enable_prefix_caching = enable_prefix_caching
        self.waiting: list[Sequence] = []  # in order of rank
        self.running: list[Sequence] = []  # in order of admission
        self.waiting_for_remote: list[Sequence] = []  # their prompts are computed by other engines
        self._remote_ready: list[Sequence] = []  # all their blocks are here; they wait for a place in `running`
        self._remote_blocks: dict[Sequence, list[int]] = {}  # block tables that a transfer may be writing to
        self._pinned: dict[Sequence, list[int]] = {}  # blocks that other engines may be reading
        self._num_forks = 0  # that wait for another sequence's prompt, and are in neither

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._remote_ready)

    @property
    def holds_remote_blocks(self) -> bool:
        """Whether a transfer to or from another engine holds blocks: they become free without a step here."""
        return bool(self._pinned or self._remote_blocks)

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run yet, those included that wait for the prompt they share."""
        return len(self.waiting) + len(self.waiting_for_remote) + len(self._remote_ready) + self._num_forks

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence and its forks. Raises ValueError if the whole pool could not hold it at its longest."""
        self._check_size(sequence)
        self._num_forks += len(sequence.forks)
        self._enqueue(sequence)

    def add_remote(self, choices: Series[Sequence]) -> None:
        """Register the choices of a request whose prompt another engine computes. Raises ValueError as `add`."""
        self._check_size(choices[0])
        for choice in choices:
            choice.status = Status.WAITING_FOR_REMOTE_KV
        self.waiting_for_remote += choices

    def reserve_remote(self, sequence: Sequence) -> tuple[int, list[int]] | None:
        """Reserve blocks for the prompt of a sequence from `add_remote`.

        Returns how many leading blocks are cached here already, and the block table; None without room. The blocks
        stay reserved until `start_remote` or `free_remote`, even if the sequence ends: a transfer may write to them.
        """
        needed = self.pool.num_blocks_for(sequence.num_prompt_tokens)
        found = self._find_prefix(sequence)
        if needed - len(found) + len(self.running) > self.pool.num_free - self.pool.num_unreferenced(found):
            return None
        self.pool.share(found)
        table = self._remote_blocks[sequence] = found + self.pool.allocate(needed - len(found))
        sequence.num_cached_tokens = len(found) * self.pool.block_size
        return len(found), table

    def start_remote(self, sequence: Sequence, choices: Series[Sequence]) -> None:
        """Run `choices` from the filled blocks reserved for `sequence`; without choices the blocks are freed."""
        table = self._remote_blocks.pop(sequence)
        num_tokens = sequence.num_prompt_tokens
        for choice in choices:
            choice.block_table = list(table)
            self.pool.share(table)
            # Without an output token yet, the last prompt token is computed again: its logits give the first one.
            choice.num_computed_tokens = min(num_tokens, len(choice.token_ids) - 1)
            choice.num_registered_blocks = choice.draft.num_computed_tokens = 0
            choice.num_cached_tokens = sequence.num_cached_tokens
            self._register(choice, choice.num_computed_tokens)
            self.waiting_for_remote.remove(choice)
            self._remote_ready.append(choice)
        self.pool.free(table)

    def free_remote(self, sequence: Sequence) -> None:
        """Free the blocks reserved for a sequence, if any: no transfer writes to them any more."""
        self.pool.free(self._remote_blocks.pop(sequence, []))

    def recompute(self, choices: Series[Sequence]) -> None:
        """Queue choices from `add_remote` to compute their prompt here, once for all without an output token."""
        for choice in choices:
            self.waiting_for_remote.remove(choice)
            choice.num_cached_tokens = None
        new = [choice for choice in choices if not choice.num_output_tokens]
        if len(new) > 1:
            new[0].forks = new[1:]
            self._num_forks += len(new) - 1
        for choice in choices:
            choice.status = Status.WAITING
            if choice not in new[1:]:
                self._enqueue(choice)

    def pin(self, sequence: Sequence) -> list[int]:
        """Pin each block of a sequence's prompt from when it is filled until `unpin`.

        Returns the list of pinned blocks, which grows as steps are committed.
        """
        return self._pinned.setdefault(sequence, [])

    def unpin(self, sequence: Sequence) -> None:
        """Free a sequence's pinned blocks, and pin no further ones."""
        self.pool.free(self._pinned.pop(sequence))

    def _check_size(self, sequence: Sequence) -> None:
        needed = self.pool.num_blocks_for(sequence.max_len)
        if needed > self.pool.num_usable:
            raise ValueError(
                f"a sequence of {sequence.max_len} tokens needs {needed} KV blocks, the cache has"
                f" {self.pool.num_usable}: raise kv_cache_memory or lower max_model_len"
            )

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's work and give it blocks: decodes, then prompts under way, then new ones.

        What it returns counts as computed from then on: commit every step, in order.
        """
        budget = self.max_num_batched_tokens
        scheduled: dict[Sequence, ScheduledSequence] = {}
        copies: dict[Sequence, tuple[int, int]] = {}
        num_preempted = 0
        while self._remote_ready and len(self.running) < self.max_num_seqs:
            self._remote_ready[0].status = Status.RUNNING
            self.running.append(self._remote_ready.pop(0))
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            num_tokens = sequence.num_uncomputed_tokens
            if num_tokens > 1:
                prefilling.append(sequence)
            elif num_tokens == 1 and sequence.can_continue:
                decoding.append(sequence)
        prefilling.sort(key=self._rank)
        for index, sequence in enumerate(decoding + prefilling):
            if budget == 0:
                break
            if sequence.status is not Status.RUNNING:
                continue  # preempted on behalf of another
            # Guesses take what the others' own tokens leave, and nobody gives blocks back for them.
            num_drafts = self._num_drafts(sequence, budget - len(decoding) + index) if index < len(decoding) else 0
            if num_drafts and self._grow(sequence, 1 + num_drafts, copies):
                scheduled[sequence] = self._take(sequence, 1 + num_drafts, num_drafts)
                budget -= 1 + num_drafts
                continue
            num_tokens = min(sequence.num_uncomputed_tokens, self.max_prefill_chunk, budget)
            while not self._grow(sequence, num_tokens, copies):
                victim = max(self.running, key=self._rank)
                undone = scheduled.pop(victim, None)
                copies.pop(victim, None)
                self._preempt(victim, undone)
                num_preempted += 1
                budget += undone.num_tokens if undone else 0
                if victim is sequence:
                    break
            else:
                scheduled[sequence] = self._take(sequence, num_tokens)
                budget -= num_tokens
        num_running, num_cached_tokens = len(self.running), 0
        # A preemption means that memory is short: whoever is admitted now would be the next victim.
        while self.waiting and budget and len(self.running) < self.max_num_seqs and not num_preempted:
            sequence = self.waiting[0]
            if sequence.num_pending_tokens or not self._admit(sequence):
                break
            num_cached_tokens += sequence.num_computed_tokens
            num_tokens = min(sequence.num_uncomputed_tokens, self.max_prefill_chunk, budget)
            grown = self._grow(sequence, num_tokens, copies)
            assert grown, "a sequence was admitted without room"
            scheduled[sequence] = self._take(sequence, num_tokens)
            budget -= num_tokens
        return SchedulerOutput(
            tuple(scheduled.values()),
            tuple(copies.values()),
            num_preempted,
            len(self.running) - num_running,
            num_cached_tokens,
        )

    def commit(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[TokenOutput]:
        """Record a step that ran: what it computed can be shared from now on, what it chose is known."""
        outputs = []
        ended = False
        for scheduled in step.scheduled_sequences:
            sequence = scheduled.sequence
            if sequence.status is Status.FINISHED:
                continue  # ended while the step ran
            end = scheduled.start + scheduled.num_tokens
            # A sequence that was preempted while the step ran has no blocks left, but its token stands.
            holds_blocks = sequence.status is Status.RUNNING and sequence.num_computed_tokens >= end
            token_ids = result.token_ids[sequence.id] if scheduled.samples else ()
            if scheduled.num_drafts:
                num_rejected = scheduled.num_drafts + 1 - len(token_ids)
                end -= num_rejected
                if holds_blocks:
                    sequence.num_computed_tokens -= num_rejected
            if holds_blocks and end // self.pool.block_size > sequence.num_registered_blocks:
                self._register(sequence, end, token_ids)
            if holds_blocks and sequence in self._pinned:
                self._pin_filled(sequence, end)
            known = len(sequence.prompt_logprobs)
            if (
                sequence.params.prompt_logprobs is not None and scheduled.start <= known
            ):  # some again after a preemption
                sequence.prompt_logprobs += result.prompt_logprobs.get(sequence.id, [])[known - scheduled.start :]
            if not scheduled.samples:
                continue
            if sequence.forks:
                self._fork(sequence, holds_blocks)
            sequence.num_pending_tokens -= 1
            for index, token_id in enumerate(token_ids):
                logprobs = None
                if sequence.params.logprobs is not None:
                    logprobs = result.logprobs[sequence.id][index]
                    sequence.logprobs.append(logprobs)
                sequence.append(token_id)
                num_accepted = num_rejected = 0
                if index == 0 and scheduled.num_drafts:
                    num_accepted = len(token_ids) - 1
                    num_rejected = scheduled.num_drafts - num_accepted
                outputs.append(last_token_output(sequence, logprobs, num_accepted, num_rejected))
                if sequence.finish_reason is not None:
                    break
            if sequence.finish_reason is not None:
                if sequence.status is Status.WAITING:
                    self.waiting.remove(sequence)
                ended = True
                self._release(sequence)
        if ended:
            self.running = [sequence for sequence in self.running if sequence.status is Status.RUNNING]
        return outputs

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it is and free what it holds. Ending it twice does nothing.

        Sequences that wait for its prompt go on without it.
        """
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
            first, *others = sequence.forks
            first.forks = others
            sequence.forks = []
            self._num_forks -= 1
            self._enqueue(first)
        sequence.finish_reason = reason
        self._release(sequence)

    def reset(self) -> list[Sequence]:
        """Take back all that was scheduled and not committed: whoever ran waits again, with the tokens it had.

        Returns the sequences that ran. Steps that were under way must not be committed any more.
        """
        ran = list(self.running)
        for sequence in ran:
            self._preempt(sequence, None)
        for sequence in self.waiting:
            sequence.num_pending_tokens = 0
            sequence.draft.num_tokens = 0
        return ran

    def isolate(self, sequence: Sequence) -> list[Sequence]:
        """Take everybody else from the queue; returns them, for `requeue`."""
        others = [other for other in self.waiting if other is not sequence]
        self.waiting = [sequence]
        return others

    def requeue(self, sequences: list[Sequence]) -> None:
        """Put sequences back that `isolate` took."""
        for sequence in sequences:
            self._enqueue(sequence)

    def check(self) -> None:
        """Prove that every block in use belongs to a running sequence. Raises AssertionError."""
        forks = [fork for queue in (self.waiting, self.running) for sequence in queue for fork in sequence.forks]
        remote = self.waiting_for_remote
        assert all(not sequence.block_table for sequence in remote), (
            "a sequence has a block table before its KV is here"
        )
        remote = [*remote, *self._remote_ready]
        assert all(sequence.status is Status.WAITING_FOR_REMOTE_KV for sequence in remote), "a remote one is elsewhere"
        assert len(forks) == self._num_forks, "forks are miscounted"
        idle = [*self.waiting, *forks]
        assert all(not sequence.block_table for sequence in idle), "a waiting sequence holds blocks"
        assert all(sequence.status is Status.WAITING for sequence in idle), "a waiting sequence is not waiting"
        assert all(sequence.status is Status.RUNNING for sequence in self.running), "a running sequence is not running"
        ranks = [self._rank(sequence) for sequence in self.waiting]
        assert ranks == sorted(ranks), "the queue is out of order"
        tables = [sequence.block_table for sequence in (*self.running, *self._remote_ready)]
        self.pool.check([*tables, *self._remote_blocks.values(), *self._pinned.values()])

    def _rank(self, sequence: Sequence) -> tuple[float, int]:
        return sequence.arrival_time + sequence.slack + sequence.priority * self.priority_aging, sequence.id

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=self._rank)

    def _num_drafts(self, sequence: Sequence, room: int) -> int:
        """Guesses that the sequence's next step may verify: their blocks are its own, and none is past its end."""
        if sequence.num_pending_tokens:
            return 0
        left = sequence.max_len - len(sequence.token_ids) - 1
        return max(0, min(sequence.draft.num_tokens, left, room))

    def _take(self, sequence: Sequence, num_tokens: int, num_drafts: int = 0) -> ScheduledSequence:
        start = sequence.num_computed_tokens
        samples = num_tokens - num_drafts == sequence.num_uncomputed_tokens
        sequence.num_computed_tokens = start + num_tokens
        sequence.num_pending_tokens += samples
        return ScheduledSequence(sequence, start, num_tokens, samples, num_drafts)

    def _admit(self, sequence: Sequence) -> bool:
        """Move the first of the queue to the running, with the part of it that is in the cache, if there is room."""
        num_tokens = len(sequence.token_ids)
        found = self._find_prefix(sequence)
        # A prompt that is there entirely still computes its last token, to choose the next one.
        num_computed = min(len(found) * self.pool.block_size, num_tokens - 1)
        copies = num_computed < len(found) * self.pool.block_size and not self.pool.num_unreferenced(found[-1:])
        needed = self.pool.num_blocks_for(num_tokens) - len(found) + copies
        # The whole prompt must fit now, and each running sequence be able to grow once: fewer preemptions.
        free = self.pool.num_free - self.pool.num_unreferenced(found)
        if needed + len(self.running) > free and (self.running or self.holds_remote_blocks):
            return False
        self.waiting.pop(0)
        self.pool.share(found)
        sequence.block_table = found
        sequence.num_computed_tokens = num_computed
        sequence.num_registered_blocks = num_computed // self.pool.block_size
        sequence.draft.num_computed_tokens = num_computed
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = num_computed
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        return True

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """The blocks of the sequence's tokens that are in the cache, as far as it may use them."""
        if not self.enable_prefix_caching:
            return []
        limit = len(sequence.token_ids)
        if (
            sequence.params.prompt_logprobs is not None
            and len(sequence.prompt_logprobs) < sequence.num_prompt_tokens - 1
        ):
            limit = len(sequence.prompt_logprobs)  # what is not computed has no logits
        self._name_blocks(sequence, limit)
        return self.pool.find_cached(sequence.block_hashes[: limit // self.pool.block_size])

    def _name_blocks(self, sequence: Sequence, num_tokens: int, new: Series[int] = ()) -> None:
        """Name the sequence's full blocks among the first `num_tokens` of its tokens and the `new` ones after them."""
        names, size = sequence.block_hashes, self.pool.block_size
        for index in range(len(names), num_tokens // size):
            parent = names[-1] if names else self.pool.hash_seed(sequence.cache_salt)
            first, last = index * size, (index + 1) * size
            beyond = last - len(sequence.token_ids)
            token_ids = sequence.token_ids[first:last] + list(new[: max(0, beyond)])
            names.append(self.pool.hash_block(parent, token_ids))

    def _register(self, sequence: Sequence, num_tokens: int, new: Series[int] = ()) -> None:
        """Let others find the blocks that the first `num_tokens` tokens have filled, `new` ones among them."""
        if not self.enable_prefix_caching:
            return
        self._name_blocks(sequence, num_tokens, new)
        for index in range(sequence.num_registered_blocks, num_tokens // self.pool.block_size):
            sequence.block_table[index] = self.pool.register(sequence.block_table[index], sequence.block_hashes[index])
        sequence.num_registered_blocks = num_tokens // self.pool.block_size

    def _pin_filled(self, sequence: Sequence, num_tokens: int) -> None:
        """Pin the blocks that the first `num_tokens` tokens have filled; the prompt's last one need not be full."""
        pinned, prompt = self._pinned[sequence], sequence.num_prompt_tokens
        count = self.pool.num_blocks_for(prompt) if num_tokens >= prompt else num_tokens // self.pool.block_size
        new = sequence.block_table[len(pinned) : count]
        self.pool.share(new)
        pinned += new

    def _fork(self, sequence: Sequence, holds_blocks: bool) -> None:
        """Set the sequences free that waited for this one's prompt. Each computes the prompt's last token again, to
        choose its own next one; whoever writes to a block that others hold copies it first."""
        size, num_tokens = self.pool.block_size, sequence.num_prompt_tokens
        for fork in sequence.forks:
            if not holds_blocks or len(self.running) >= self.max_num_seqs:
                self._enqueue(fork)  # it will find the full blocks in the cache
                continue
            fork.block_table = sequence.block_table[: self.pool.num_blocks_for(num_tokens)]
            self.pool.share(fork.block_table)
            fork.block_hashes = sequence.block_hashes[: num_tokens // size]
            fork.num_computed_tokens = fork.num_cached_tokens = num_tokens - 1
            fork.num_registered_blocks = fork.num_computed_tokens // size
            fork.draft.num_computed_tokens = min(sequence.draft.num_computed_tokens, fork.num_computed_tokens)
            fork.status = Status.RUNNING
            self.running.append(fork)
        self._num_forks -= len(sequence.forks)
        sequence.forks = []

    def _grow(self, sequence: Sequence, num_tokens: int, copies: dict[Sequence, tuple[int, int]]) -> bool:
        """Give the sequence blocks of its own to write `num_tokens` more tokens to, or nothing."""
        table, first = sequence.block_table, sequence.num_computed_tokens // self.pool.block_size
        # Guesses that were wrong have left it more than it needs.
        needed = max(0, self.pool.num_blocks_for(sequence.num_computed_tokens + num_tokens) - len(table))
        continues = first < len(table)
        copy = continues and self.pool.is_shared(table[first])
        if needed + copy > self.pool.num_free:
            return False
        if copy:
            source, [destination] = table[first], self.pool.allocate(1)
            self.pool.free((source,))
            table[first] = destination
            copies[sequence] = source, destination
        elif continues and first >= len(sequence.block_hashes):
            self.pool.forget(table[first])  # a parent may have filled it; what has this sequence's name stays as it is
        if needed > 0:
            table += self.pool.allocate(needed)
        return True

    def _preempt(self, sequence: Sequence, undone: ScheduledSequence | None) -> None:
        """Take a running sequence's blocks, and back the work that this step would have done for it."""
        self.running.remove(sequence)
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.num_registered_blocks = 0
        if undone is not None and undone.samples:
            sequence.num_pending_tokens -= 1
        self._enqueue(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.status = Status.FINISHED
