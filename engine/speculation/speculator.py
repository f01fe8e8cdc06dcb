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
from weakref import WeakKeyDictionary

from dispec.engine.execution.pending_step import DeviceDrafts
from dispec.engine.scheduling.scheduler_output import ModelRunnerOutput, SchedulerOutput
from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.speculation.controller import Candidate, DraftController
from dispec.engine.speculation.proposer import Proposal, Proposer


class Speculator:
    """Plans draft tokens before a step is scheduled, proposes them before it runs, and learns from its result.

    max_num_draft_tokens: most draft tokens of one sequence in a step.
    is_adaptive: let the controller choose the number of draft tokens; else propose as many as possible.
    num_planned: draft tokens that the last plan asked for.
    device_drafts: draft tokens of the last proposal that the device has yet to compute.
    """

    def __init__(self, max_num_draft_tokens: int, proposer: Proposer, *, is_adaptive: bool = True) -> None:
        self.max_num_draft_tokens = max_num_draft_tokens
        self.proposer = proposer
        self.is_adaptive = is_adaptive
        self.controller = DraftController()
        self.num_planned = 0
        self.device_drafts: DeviceDrafts | None = None
        self._acceptance_rates: WeakKeyDictionary[Sequence, float] = WeakKeyDictionary()
        self._proposal = Proposal()
        self._draft_seconds = 0.0  # of the last proposal on the host, without catching up

    def needs_result(self, running: Iterable[Sequence]) -> bool:
        """Return whether the plan of the next step depends on the samples of the step under way.

        It does not while only prompts are computed or the controller rests.
        """
        num_decoding = sum(sequence.num_uncomputed_tokens == 1 for sequence in running)
        return num_decoding > 0 and not (self.is_adaptive and self.controller.is_resting(num_decoding))

    def plan(self, running: Iterable[Sequence]) -> None:
        """Set the number of draft tokens of each running sequence in the next step."""
        decoding = []
        for sequence in running:
            # A step that reads a sampled token from the device must not find the draft tokens of an earlier one.
            sequence.draft.num_tokens, sequence.draft.token_ids = 0, []
            if sequence.num_uncomputed_tokens == 1:
                decoding.append(sequence)
        available: dict[Sequence, int] = {}
        if not (self.is_adaptive and self.controller.is_resting(len(decoding))):
            for sequence in decoding:
                if sequence.grammar is not None and sequence.grammar.is_closing:
                    continue  # its next tokens are known
                if count := self.proposer.prepare(sequence, self.max_num_draft_tokens):
                    available[sequence] = count
        limit = self.max_num_draft_tokens
        if self.is_adaptive:
            candidates = [self._candidate(sequence, count) for sequence, count in available.items()]
            limit = self.controller.choose(candidates, len(decoding))
        for sequence, count in available.items():
            sequence.draft.num_tokens = min(limit, count)
        self.num_planned = sum(sequence.draft.num_tokens for sequence in available)

    def _candidate(self, sequence: Sequence, max_drafts: int) -> Candidate:
        return Candidate(
            max_drafts,
            self._acceptance_rates.setdefault(sequence, self.controller.acceptance_rate),
            self.proposer.num_missing_tokens(sequence),
            sequence.params.token_limit - sequence.num_output_tokens,
        )

    def propose(self, step: SchedulerOutput) -> float:
        """Propose the draft tokens that the step verifies, or launch that on the device. Return the host's seconds."""
        started = time.perf_counter()
        self._proposal = proposal = self.proposer.propose(step)
        seconds = time.perf_counter() - started
        self.device_drafts = proposal.device_drafts
        self._draft_seconds = seconds - proposal.catch_up_seconds
        if proposal.num_catch_up_tokens:
            self.controller.observe_catch_up(proposal.num_catch_up_tokens, proposal.catch_up_seconds)
        return seconds

    def observe(
        self, step: SchedulerOutput, result: ModelRunnerOutput, seconds: float, draft_seconds: float = 0.0
    ) -> tuple[int, ...]:
        """Learn from a committed step. Return the number of accepted draft tokens by their position in a draft.

        seconds: of the step without its proposal.
        draft_seconds: of the device, for draft tokens that the host did not wait for.
        """
        drafted = [scheduled for scheduled in step.scheduled_sequences if scheduled.num_draft_tokens]
        if drafted and self._proposal.num_draft_steps:
            # The host's time counts only where the device's does not hide it.
            draft_seconds = draft_seconds if self._proposal.device_drafts is not None else self._draft_seconds
            self.controller.observe_draft(len(drafted), self._proposal.num_draft_steps, draft_seconds)
        for scheduled in step.scheduled_sequences:
            sequence = scheduled.sequence
            sequence.draft.num_computed_tokens = min(sequence.draft.num_computed_tokens, sequence.num_computed_tokens)
        num_accepted_per_position = [0] * self.max_num_draft_tokens
        for scheduled in drafted:
            sequence, num_accepted = scheduled.sequence, len(result.token_ids[scheduled.sequence.id]) - 1
            rate = self._acceptance_rates.get(sequence, self.controller.acceptance_rate)
            self._acceptance_rates[sequence] = self.controller.observe_acceptance(
                rate, scheduled.num_draft_tokens, num_accepted
            )
            for position in range(num_accepted):
                num_accepted_per_position[position] += 1
        num_tokens = {scheduled.num_tokens for scheduled in step.scheduled_sequences}
        if step.scheduled_sequences and all(
            scheduled.samples and scheduled.num_tokens == 1 + scheduled.num_draft_tokens
            for scheduled in step.scheduled_sequences
        ):
            self.controller.observe_step(step.num_tokens, seconds, is_uniform=len(num_tokens) == 1)
        return tuple(num_accepted_per_position) if drafted else ()
