"""Speculative decoding: propose draft tokens and verify all of them in one step (arXiv:2211.17192).

Each position is sampled exactly as without speculation, with the sequence's own random numbers for it. Draft tokens
that match the sample are accepted; the first that does not is rejected and replaced by the sample. The output is
therefore the one without speculation, token by token, at any temperature and with every parameter; only its speed
differs. A draft token is accepted with a probability of at least (1 - d) / (1 + d), for two models whose distributions
differ by d in total variation (arXiv:2408.07978). Rejection sampling would reach 1 - d, with output that depends on the
draft model.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

from dispec.engine.execution.pending_step import DeviceDrafts
from dispec.engine.scheduling.scheduler_output import ModelRunnerOutput, SchedulerOutput
from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.speculation.acceptance import Acceptance
from dispec.engine.speculation.controller import DraftController
from dispec.engine.speculation.draft_loop import LAST_TOKENS, num_missing
from dispec.engine.speculation.draft_model import DraftModel
from dispec.engine.speculation.ngram import NgramIndex
from dispec.engine.speculation.planned_step import Behind

_LONG_MEMORY = 0.998  # as `Acceptance.forgetting`, of all sequences together: what the next one begins with


@dataclass(slots=True)
class SpeculationState:
    """The acceptance and the n-grams of one sequence."""

    acceptance: Acceptance
    ngrams: NgramIndex = field(default_factory=NgramIndex)


class _Guessing(NamedTuple):
    """What the last proposal took the host. runs: passes of the draft model."""

    num_sequences: int
    runs: int
    seconds: float


def _behind(sequence: Sequence) -> Behind:
    remaining = sequence.params.max_tokens - sequence.num_output_tokens
    return Behind(max(0, num_missing(sequence) - LAST_TOKENS), remaining)


class Speculator:
    """Plans draft tokens before a step is scheduled, proposes them before it runs, and learns from its result.

    max_num_drafts: most draft tokens of one sequence in a step.
    draft_model: proposes draft tokens; if None, the sequence's own n-grams do.
    is_adaptive: let the controller choose the number of draft tokens; else propose as many as possible.
    num_planned: draft tokens that the last plan asked for.
    drafts: draft tokens of the last proposal that are still on the device.
    """

    def __init__(self, max_num_drafts: int, draft_model: DraftModel | None = None, *, is_adaptive: bool = True) -> None:
        self.max_num_drafts = max_num_drafts
        self.draft_model = draft_model
        self.is_adaptive = is_adaptive
        self.controller = DraftController()
        self._states: WeakKeyDictionary[Sequence, SpeculationState] = WeakKeyDictionary()
        self._usual = Acceptance(forgetting=_LONG_MEMORY)
        self.num_planned = 0
        self.drafts: DeviceDrafts | None = None
        self._guessing: _Guessing | None = None

    def needs_result(self, running: Iterable[Sequence]) -> bool:
        """Return whether the plan of the next step depends on what the step under way samples.

        It does not while only prompts are computed, nor while a draft model rests: the controller then plans several
        steps without draft tokens at once.
        """
        num_decoding = sum(sequence.num_uncomputed_tokens == 1 for sequence in running)
        if not num_decoding:
            return False
        return not (self.is_adaptive and self.draft_model is not None and self.controller.is_resting(num_decoding))

    def plan(self, running: Iterable[Sequence]) -> None:
        """Set the number of draft tokens of each running sequence in the next step."""
        decoding = []
        for sequence in running:
            # A step that reads a sampled token from the device must not find the draft tokens of an earlier one.
            sequence.draft.num_tokens, sequence.draft.token_ids = 0, []
            if sequence.num_uncomputed_tokens == 1:
                decoding.append(sequence)
        available: dict[int, int] = {}
        for sequence in decoding:
            if sequence not in self._states:
                self._states[sequence] = SpeculationState(self._usual.of_another())
            if self.draft_model is None:
                drafts = self._states[sequence].ngrams.propose(sequence.token_ids, self.max_num_drafts)
                sequence.draft.token_ids = drafts
                if drafts:
                    available[sequence.id] = len(drafts)
            else:
                available[sequence.id] = self.max_num_drafts
        chosen = available
        if self.is_adaptive and len(available) == len(decoding) and self.controller.rests(len(decoding)):
            chosen = {}
        elif self.is_adaptive:
            acceptance = {sequence.id: self._states[sequence].acceptance for sequence in decoding}
            behind = {} if self.draft_model is None else {one.id: _behind(one) for one in decoding}
            chosen = self.controller.choose(available, acceptance, len(decoding), behind)
        for sequence in decoding:
            sequence.draft.num_tokens = chosen.get(sequence.id, 0)
        self.num_planned = sum(chosen.values())

    def propose(self, step: SchedulerOutput) -> float:
        """Propose the draft tokens that the step verifies, or launch that on the device. Return the host's seconds."""
        self.drafts = self._guessing = None
        if self.draft_model is None:
            return 0.0
        started = time.perf_counter()
        proposal = self.draft_model.propose(step)
        seconds = time.perf_counter() - started
        self.drafts = proposal.drafts
        if proposal.caught_up:
            self.controller.observe_catch_up(proposal.caught_up, proposal.catch_up_seconds)
        if proposal.runs:
            num_guessing = sum(scheduled.num_drafts > 0 for scheduled in step.scheduled_sequences)
            self._guessing = _Guessing(num_guessing, proposal.runs, seconds - proposal.catch_up_seconds)
        return seconds

    def observe(
        self, step: SchedulerOutput, result: ModelRunnerOutput, seconds: float, draft_seconds: float = 0.0
    ) -> tuple[int, ...]:
        """Learn from a committed step, and return the number of accepted draft tokens by their position in a draft.

        seconds: of the step without its proposal.
        draft_seconds: of the device, for draft tokens that the host did not wait for.
        """
        if self._guessing is not None:
            # The host's time counts only where the device's does not hide it.
            whole = self._guessing.seconds if self.drafts is None else draft_seconds
            self.controller.observe_draft(self._guessing.num_sequences, self._guessing.runs, whole)
            self._guessing = None
        stood = [0] * self.max_num_drafts
        num_drafts = 0
        for scheduled in step.scheduled_sequences:
            sequence = scheduled.sequence
            sequence.draft.num_computed_tokens = min(sequence.draft.num_computed_tokens, sequence.num_computed_tokens)
            if not scheduled.num_drafts:
                continue
            num_accepted = len(result.token_ids[sequence.id]) - 1
            num_drafts += scheduled.num_drafts
            if sequence in self._states:
                self._states[sequence].acceptance.observe(scheduled.num_drafts, num_accepted)
                self._usual.observe(scheduled.num_drafts, num_accepted)
            for place in range(num_accepted):
                stood[place] += 1
        if step.scheduled_sequences and all(
            scheduled.samples and scheduled.num_tokens == 1 + scheduled.num_drafts
            for scheduled in step.scheduled_sequences
        ):
            is_uniform = len({scheduled.num_tokens for scheduled in step.scheduled_sequences}) == 1
            self.controller.observe_step(step.num_tokens, seconds, is_uniform=is_uniform)
        return tuple(stood) if num_drafts else ()
