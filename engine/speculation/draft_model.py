"""Draft tokens from a smaller model, whose KV cache is addressed by the sequences' own block tables.

It samples as its target does: with the sequence's own random numbers, which depend on seed and position alone, and
after the same penalties and filters. Where the two models agree, the draft token is the token that the target samples,
at any temperature: Gumbel coupling (arXiv:2408.07978). What the target samples does not depend on the draft model.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

from dispec.engine.execution.model_runner import ModelRunner
from dispec.engine.execution.pending_step import DeviceDrafts
from dispec.engine.execution.sampler import Functions
from dispec.engine.loading.checkpoint import Checkpoint, find_checkpoint
from dispec.engine.loading.draft_checkpoint import SharedDraft, find_shared_draft
from dispec.engine.loading.model_source import SPECULATIVE_MODELS, find_source
from dispec.engine.options import EngineOptions
from dispec.engine.scheduling.scheduler_output import ScheduledSequence, SchedulerOutput
from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.speculation.draft_loop import LAST_TOKENS, DraftLoop, can_loop, num_missing
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


class Proposal(NamedTuple):
    """The number of passes of the draft model, and those of its draft tokens that are still on the device.

    caught_up: tokens that it had to compute before. catch_up_seconds: the time that these took.
    """

    runs: int
    drafts: DeviceDrafts | None = None
    caught_up: int = 0
    catch_up_seconds: float = 0.0


class DraftModel:
    """Proposes draft tokens for sequences whose blocks are allocated up to their last draft token.

    A sequence's `draft.num_computed_tokens` counts the tokens that this model has computed; it computes the others
    before the sequence's next draft. Blocks that it has not computed itself only lower the acceptance rate.
    """

    def __init__(self, runner: ModelRunner, loop: DraftLoop, max_num_batched_tokens: int) -> None:
        self._runner = runner
        self._loop = loop
        self._max_num_batched_tokens = max_num_batched_tokens

    def compile_pieces(self, sampler: Functions) -> Iterator[None]:
        """Compile the draft loop and the model's steps, one call of what is compiled at each `next`.

        sampler: the target's compiled functions.
        """
        yield from self._loop.compile()
        yield from self._runner.compile_pieces(sampler)

    def propose(self, step: SchedulerOutput) -> Proposal:
        """Fill `draft.token_ids` of the step's sequences that are to have some."""
        if step.copies:
            self._runner.run(SchedulerOutput((), step.copies))
        guessing = {
            scheduled.sequence: scheduled.num_drafts for scheduled in step.scheduled_sequences if scheduled.num_drafts
        }
        for sequence in guessing:
            sequence.draft.token_ids = []
        started = time.perf_counter()
        caught_up = self._catch_up(list(guessing))
        catch_up_seconds = time.perf_counter() - started
        runs = 0
        looping = {sequence: count for sequence, count in guessing.items() if can_loop(sequence)}
        stepping = {sequence: count for sequence, count in guessing.items() if sequence not in looping}
        for depth in range(max(stepping.values(), default=0)):
            deep = [sequence for sequence, count in stepping.items() if count > depth]
            # The first pass computes the token that the target sampled last, and the draft token before it, if any.
            self._run([_work(sequence, samples=True) for sequence in deep])
            runs += 1
        drafts = None
        if looping:
            drafts = self._loop.run(looping)
            runs += max(looping.values())
            for sequence, count in looping.items():
                sequence.draft.num_computed_tokens = len(sequence.token_ids) + count - 1
        return Proposal(runs, drafts, caught_up, catch_up_seconds)

    def _catch_up(self, sequences: list[Sequence]) -> int:
        """Compute all but the last two tokens of each sequence, and return how many tokens that took."""
        caught_up, budget, works = 0, self._max_num_batched_tokens, []
        waiting = [sequence for sequence in sequences if num_missing(sequence) > LAST_TOKENS]
        while waiting:
            sequence = waiting[0]
            count = min(num_missing(sequence) - 1, budget)
            works.append(ScheduledSequence(sequence, sequence.draft.num_computed_tokens, count, samples=False))
            budget -= count
            caught_up += count
            sequence.draft.num_computed_tokens += count
            if num_missing(sequence) == 1:
                waiting.pop(0)
            if not budget or not waiting:
                self._runner.run(SchedulerOutput(tuple(works)))
                budget, works = self._max_num_batched_tokens, []
        return caught_up

    def _run(self, works: list[ScheduledSequence]) -> None:
        result = self._runner.run(SchedulerOutput(tuple(works)))
        for scheduled in works:
            scheduled.sequence.draft.num_computed_tokens = scheduled.start + scheduled.num_tokens
            scheduled.sequence.draft.token_ids.append(result.token_ids[scheduled.sequence.id][0])


def _work(sequence: Sequence, *, samples: bool) -> ScheduledSequence:
    """Return all tokens that the model has not computed yet, its own draft tokens included; none is verified."""
    known = len(sequence.token_ids) + len(sequence.draft.token_ids)
    return ScheduledSequence(
        sequence, sequence.draft.num_computed_tokens, known - sequence.draft.num_computed_tokens, samples
    )
