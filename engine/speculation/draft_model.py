"""Draft tokens from a smaller model, whose KV cache is addressed by the sequences' own block tables.

It samples as its target does: with the sequence's own random numbers, which depend on seed and position alone, and
after the same penalties and filters. Where the two models agree, the draft token is the token that the target samples,
at any temperature: Gumbel coupling (arXiv:2408.07978). The target's samples do not depend on the draft model.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

from dispec.engine.execution.model_runner import ModelRunner
from dispec.engine.execution.sampler import SamplerFunctions
from dispec.engine.loading.checkpoint import Checkpoint, find_checkpoint
from dispec.engine.loading.draft_checkpoint import SharedDraft, find_shared_draft
from dispec.engine.loading.model_source import SPECULATIVE_MODELS, find_source
from dispec.engine.options import EngineOptions
from dispec.engine.scheduling.scheduler_output import ScheduledSequence, SchedulerOutput
from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.speculation.draft_loop import LAST_TOKENS, DraftLoop, can_loop, num_uncomputed_tokens
from dispec.engine.speculation.proposer import Proposal
from dispec.engine.text.tokenizer import Tokenizer
from dispec.layers.config import ModelConfig


class Draft(NamedTuple):
    """The draft model; without a checkpoint it has dummy weights."""

    config: ModelConfig
    checkpoint: Checkpoint | SharedDraft | None

    @property
    def head_tokens(self) -> tuple[int, ...] | None:
        """The token of each row of its head, if these are not all tokens in order."""
        return self.checkpoint.head_tokens if isinstance(self.checkpoint, SharedDraft) else None


def find_draft(options: EngineOptions, target: Checkpoint | None, config: ModelConfig) -> Draft | None:
    """Return the draft model of the options, if they name one. config: the target's.

    Raises ValueError if its tokenizer is not the target's.
    """
    name = options.speculative_model
    if name is None or name == "ngram":
        return None
    if isinstance(name, ModelConfig):
        return Draft(name, None)
    is_dummy = options.load_format == "dummy"
    tokenizer = Tokenizer.from_directory(target.directory) if target is not None and not is_dummy else None
    shared = find_shared_draft(name, tokenizer, config)
    if shared is not None:
        return Draft(shared.config, None if is_dummy else shared)
    find_source(name, SPECULATIVE_MODELS)
    if is_dummy:
        return Draft(find_checkpoint(name, without_weights=True).config, None)
    checkpoint = find_checkpoint(name)
    if tokenizer is not None and Tokenizer.from_directory(checkpoint.directory).vocabulary != tokenizer.vocabulary:
        raise ValueError(
            f"speculative_model {str(name)!r} has another tokenizer than {str(options.model)!r}: its draft tokens"
            " would mean something else"
        )
    return Draft(checkpoint.config, checkpoint)


class DraftModelProposer:
    """Proposes the tokens that a smaller model samples.

    A sequence's `draft.num_computed_tokens` counts the tokens that this model has computed; it computes the others
    before the sequence's next draft. Blocks that it has not computed itself only lower the acceptance rate.
    """

    def __init__(self, runner: ModelRunner, loop: DraftLoop, max_num_batched_tokens: int) -> None:
        self._runner = runner
        self._loop = loop
        self._max_num_batched_tokens = max_num_batched_tokens

    def compile_pieces(self, sampler: SamplerFunctions) -> Iterator[None]:
        """Compile the draft loop and the model's steps, one function at each `next`.

        sampler: the target's compiled functions.
        """
        yield from self._loop.compile()
        yield from self._runner.compile_pieces(sampler)

    def prepare(self, sequence: Sequence, max_drafts: int) -> int:
        """Return `max_drafts`: any sequence can have as many."""
        return max_drafts

    def num_missing_tokens(self, sequence: Sequence) -> int:
        """Return the number of tokens to compute before the sequence's first draft token."""
        return max(0, num_uncomputed_tokens(sequence) - LAST_TOKENS)

    def propose(self, step: SchedulerOutput) -> Proposal:
        """Fill `draft.token_ids` of the step's sequences that have draft tokens."""
        if step.copies:
            self._runner.run(SchedulerOutput((), step.copies))
        num_draft_tokens = {
            scheduled.sequence: scheduled.num_draft_tokens
            for scheduled in step.scheduled_sequences
            if scheduled.num_draft_tokens
        }
        if not num_draft_tokens:
            return Proposal()
        for sequence in num_draft_tokens:
            sequence.draft.token_ids = []
        started = time.perf_counter()
        num_catch_up_tokens = self._catch_up(list(num_draft_tokens))
        catch_up_seconds = time.perf_counter() - started
        looping = {sequence: count for sequence, count in num_draft_tokens.items() if can_loop(sequence)}
        stepping = {sequence: count for sequence, count in num_draft_tokens.items() if sequence not in looping}
        num_steps = max(stepping.values(), default=0)
        for index in range(num_steps):
            self._run([sequence for sequence, count in stepping.items() if count > index])
        device_drafts = self._loop.run(looping) if looping else None
        for sequence, count in looping.items():
            sequence.draft.num_computed_tokens = len(sequence.token_ids) + count - 1
        num_steps += max(looping.values(), default=0)
        return Proposal(num_steps, device_drafts, num_catch_up_tokens, catch_up_seconds)

    def _catch_up(self, sequences: list[Sequence]) -> int:
        """Compute all but the last two tokens of each sequence, and return the number of tokens computed."""
        total, budget, scheduled = 0, self._max_num_batched_tokens, []
        waiting = [sequence for sequence in sequences if num_uncomputed_tokens(sequence) > LAST_TOKENS]
        while waiting:
            sequence = waiting[0]
            count = min(num_uncomputed_tokens(sequence) - 1, budget)
            scheduled.append(ScheduledSequence(sequence, sequence.draft.num_computed_tokens, count, samples=False))
            budget -= count
            total += count
            sequence.draft.num_computed_tokens += count
            if num_uncomputed_tokens(sequence) == 1:
                waiting.pop(0)
            if not budget or not waiting:
                self._runner.run(SchedulerOutput(tuple(scheduled)))
                budget, scheduled = self._max_num_batched_tokens, []
        return total

    def _run(self, sequences: list[Sequence]) -> None:
        """Sample one more draft token of each sequence, from all tokens and draft tokens not computed yet."""
        scheduled = []
        for sequence in sequences:
            start = sequence.draft.num_computed_tokens
            known = len(sequence.token_ids) + len(sequence.draft.token_ids)
            scheduled.append(ScheduledSequence(sequence, start, known - start, samples=True))
            sequence.draft.num_computed_tokens = known
        result = self._runner.run(SchedulerOutput(tuple(scheduled)))
        for sequence in sequences:
            sequence.draft.token_ids.append(result.token_ids[sequence.id][0])
