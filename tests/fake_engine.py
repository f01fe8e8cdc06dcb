"""An engine without a model, to test the scheduler: its tokens are right only if its cache is.

The KV cache is a dictionary from (block, offset) to the token there and a hash of all tokens before it. Each step
writes its tokens through the sequences' block tables and reads every context back before it samples, so that a block
that was shared, reused or copied wrongly gives another token, or none.
"""

import itertools
import random
import zlib
from collections import Counter, deque
from collections.abc import Mapping
from collections.abc import Sequence as Series
from dataclasses import replace
from typing import NamedTuple

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.block_pool import BlockPool
from dispec.engine.scheduling.scheduler import Scheduler
from dispec.engine.scheduling.scheduler_output import ModelRunnerOutput, SchedulerOutput
from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.scheduling.token_output import TokenLogprobs, TokenOutput

VOCAB_SIZE = 8
SIZE = 4  # tokens in a block, unless a test says otherwise


def tokens(count: int, first: int = 0) -> list[int]:
    """Return `count` tokens; those of another `first` share no prefix."""
    return [first, *(position * position % 7 for position in range(1, count))][:count]


def computed(step: SchedulerOutput) -> dict[int, int]:
    """Return the number of tokens that the step computes, by sequence id."""
    return {scheduled.sequence.id: scheduled.num_tokens for scheduled in step.scheduled_sequences}


class Entry(NamedTuple):
    """A token in the cache. history: a hash of it and all tokens before it."""

    token_id: int
    position: int
    history: int


def entry_after(previous: Entry | None, token_id: int) -> Entry:
    position, history = (previous.position + 1, previous.history) if previous else (0, 0)
    return Entry(token_id, position, zlib.crc32(b"%d %d" % (token_id, position), history))


def entries_of(token_ids: Series[int]) -> list[Entry]:
    """Return the cache entries of a sequence."""
    entries: list[Entry] = []
    for token_id in token_ids:
        entries.append(entry_after(entries[-1] if entries else None, token_id))
    return entries


def next_token(context: Series[Entry], seed: int) -> int:
    return zlib.crc32(repr((*context, seed)).encode()) % VOCAB_SIZE


def logprob_after(entry: Entry, token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -float(entry.history), 1, ())


def alone(sequence: Sequence) -> list[int]:
    """Return the sequence's output tokens as if it ran alone with unlimited memory."""
    same = replace(sequence, token_ids=sequence.token_ids[: sequence.num_prompt_tokens], choices=(), forks=[])
    same.finish_reason = None
    while same.finish_reason is None:
        same.append(next_token(entries_of(same.token_ids), same.seed))
    return same.output_token_ids


class FakeModel:
    """Runs steps on the fake cache. A step may be run before the one before it is committed."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._size = scheduler.pool.block_size
        self._cache: dict[tuple[int, int], Entry] = {}
        self._chosen: Mapping[int, list[int]] = {}  # by the step before

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        holders = Counter(block for sequence in self._scheduler.running for block in sequence.block_table)
        self._copy(step, holders)
        token_ids: dict[int, list[int]] = {}
        logprobs: dict[int, list[TokenLogprobs]] = {}
        prompt_logprobs = {}
        for scheduled in step.scheduled_sequences:
            self._write(scheduled.sequence, scheduled.start, scheduled.num_tokens, scheduled.num_draft_tokens, holders)
        for scheduled in step.scheduled_sequences:
            sequence, end = scheduled.sequence, scheduled.start + scheduled.num_tokens
            end -= scheduled.num_draft_tokens
            assert scheduled.samples == (
                end == len(sequence.token_ids) + sequence.num_pending_tokens - scheduled.samples
            )
            end += scheduled.num_draft_tokens
            context = [self._entry(sequence, position) for position in range(end)]
            assert [entry.position for entry in context] == list(range(end)), "read an entry of another position"
            assert end < sequence.max_len, "computes a token at the sequence's end"
            if scheduled.samples and sequence.params.needs_last_token:
                assert end - scheduled.num_draft_tokens == len(sequence.token_ids), (
                    "chooses a token before the last one is known"
                )
            if scheduled.samples:
                chosen: list[int] = []
                for known in range(end - scheduled.num_draft_tokens, end + 1):
                    chosen.append(next_token(context[:known], sequence.seed))
                    if known < end and chosen[-1] != scheduled.draft_token_ids[len(chosen) - 1]:
                        break
                token_ids[sequence.id] = chosen
                logprobs[sequence.id] = [logprob_after(Entry(0, 0, 0), 0) for _ in chosen]
            targets = sequence.token_ids[scheduled.start + 1 : min(end + 1, sequence.num_prompt_tokens)]
            if sequence.params.prompt_logprobs is not None and targets:
                pairs = zip(context[scheduled.start :], targets, strict=False)
                prompt_logprobs[sequence.id] = [logprob_after(entry, token_id) for entry, token_id in pairs]
        self._chosen = token_ids
        return ModelRunnerOutput(token_ids, logprobs, prompt_logprobs)

    def _copy(self, step: SchedulerOutput, holders: Counter[int]) -> None:
        offsets = range(self._size)
        read = [[self._cache.get((source, offset)) for offset in offsets] for source, _ in step.copies]
        for (_, destination), entries in zip(step.copies, read, strict=True):
            assert holders[destination] == 1, "copied to a block that others hold"
            for offset, entry in enumerate(entries):
                self._cache.pop((destination, offset), None)
                if entry is not None:
                    self._cache[destination, offset] = entry
        assert len({destination for _, destination in step.copies}) == len(step.copies), "copied twice to one block"
        written = {
            scheduled.sequence.block_table[scheduled.start // self._size] for scheduled in step.scheduled_sequences
        }
        assert written >= {destination for _, destination in step.copies}, "copied a block that no sequence writes to"

    def _write(
        self, sequence: Sequence, start: int, num_tokens: int, num_draft_tokens: int, holders: Counter[int]
    ) -> None:
        previous = self._entry(sequence, start - 1) if start else None
        for position in range(start, start + num_tokens):
            if position < len(sequence.token_ids):
                token_id = sequence.token_ids[position]
            else:
                ahead = position - len(sequence.token_ids)
                if num_draft_tokens:
                    token_id = sequence.draft.token_ids[ahead]
                else:
                    assert ahead == 0, "computes a token after one that is not known"
                    token_id = self._chosen[sequence.id][-1]
            previous = entry_after(previous, token_id)
            block, offset = sequence.block_table[position // self._size], position % self._size
            # A prompt found whole computes its last token again in place, where others may find it in the same step.
            is_same = self._cache.get((block, offset)) == previous
            assert holders[block] == 1 or is_same, f"writes to block {block}, which {holders[block]} hold"
            self._cache[block, offset] = previous

    def _entry(self, sequence: Sequence, position: int) -> Entry:
        return self._cache[sequence.block_table[position // self._size], position % self._size]


class FakeEngine:
    """The loop of `Engine`, with a clock that ticks once for each request."""

    def __init__(
        self,
        num_blocks: int = 1000,
        block_size: int = SIZE,
        *,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 512,
        max_prefill_chunk: int | None = None,
        max_lone_prefill_chunk: int | None = None,
        priority_aging: float = 60.0,
        enable_prefix_caching: bool = True,
        drafts: random.Random | None = None,
    ) -> None:
        self.drafts = drafts
        self.pool = BlockPool(num_blocks + 1, block_size, key=b"test")
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs,
            max_num_batched_tokens,
            max_prefill_chunk=max_prefill_chunk,
            max_lone_prefill_chunk=max_lone_prefill_chunk,
            priority_aging=priority_aging,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.max_model_len = num_blocks * block_size
        self.model = FakeModel(self.scheduler)
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.ids = itertools.count()
        self.clock = itertools.count()

    @property
    def num_used(self) -> int:
        return self.pool.num_usable - self.pool.num_free

    def add(
        self,
        prompt: Series[int],
        max_tokens: int = 4,
        *,
        n: int = 1,
        priority: int = 0,
        cache_salt: str | None = None,
        stop_token_ids: frozenset[int] = frozenset(),
        arrival_time: float | None = None,
        **params: int | float | None,
    ) -> Sequence:
        """As `Engine.add`; the first of the choices."""
        shared = SamplingParams(n=n, max_tokens=max_tokens, **params)  # type: ignore[arg-type]
        now = float(next(self.clock)) if arrival_time is None else arrival_time
        choices = [
            Sequence(
                id=next(self.ids),
                token_ids=list(prompt),
                params=replace(shared, prompt_logprobs=None) if index else shared,
                seed=index,
                stop_token_ids=stop_token_ids,
                max_len=min(self.max_model_len, len(prompt) + max_tokens),
                arrival_time=now,
                priority=priority,
                cache_salt=cache_salt,
            )
            for index in range(n)
        ]
        for choice in choices:
            choice.choices = tuple(choices)
        first, *first.forks = choices
        self.scheduler.add(first)
        return first

    def step(self, overlaps: bool = False) -> SchedulerOutput:
        """As `Engine.step`, with every invariant checked; the step that was scheduled."""
        self._propose()
        step = self.scheduler.schedule()
        self._check(step)
        if step.scheduled_sequences:
            self.in_flight.append((step, self.model.run(step)))
        outputs: list[TokenOutput] = []
        while len(self.in_flight) > (overlaps if step.scheduled_sequences else 0):
            outputs += self.scheduler.commit(*self.in_flight.popleft())
            self.scheduler.check()
        assert step.scheduled_sequences or outputs or not self.scheduler.has_work, "has work and schedules none of it"
        return step

    def run(self, overlaps: bool = False, limit: int = 10_000) -> list[SchedulerOutput]:
        """Step until nothing is left to do."""
        steps: list[SchedulerOutput] = []
        while self.scheduler.has_work or self.in_flight:
            assert len(steps) < limit, f"not done after {limit} steps"
            steps.append(self.step(overlaps))
        return steps

    def _propose(self) -> None:
        """As `Speculator.plan`: up to four draft tokens, 70 % of which are accepted."""
        if self.drafts is None:
            return
        for sequence in self.scheduler.running:
            sequence.draft.num_tokens = 0
            if sequence.num_pending_tokens or sequence.num_uncomputed_tokens != 1:
                continue
            sequence.draft.num_tokens, sequence.draft.token_ids = self.drafts.randrange(5), []
            for _ in range(sequence.draft.num_tokens):
                known = [*sequence.token_ids, *sequence.draft.token_ids]
                accepted = next_token(entries_of(known), sequence.seed)
                rejected = (accepted + 1) % VOCAB_SIZE
                sequence.draft.token_ids.append(accepted if self.drafts.random() < 0.7 else rejected)

    def _check(self, step: SchedulerOutput) -> None:
        scheduler = self.scheduler
        scheduler.check()
        assert step.num_tokens <= scheduler.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert not (step.num_preempted and step.num_admitted)
        assert len({scheduled.sequence for scheduled in step.scheduled_sequences}) == len(step.scheduled_sequences)
        assert {scheduled.sequence for scheduled in step.scheduled_sequences} <= set(scheduler.running)
        is_lone = len(scheduler.running) + len(scheduler.waiting) == 1
        max_chunk = scheduler.max_lone_prefill_chunk if is_lone else scheduler.max_prefill_chunk
        assert all(
            1 <= scheduled.num_tokens - scheduled.num_draft_tokens <= max_chunk
            for scheduled in step.scheduled_sequences
        )
        assert all(
            scheduled.sequence.num_computed_tokens == scheduled.start + scheduled.num_tokens
            for scheduled in step.scheduled_sequences
        )
