"""Speculative decoding: guess tokens ahead, verify all guesses in one step (arXiv:2211.17192).

Every guess is verified by choosing its place's token as if nobody had guessed, with the sequence's own random numbers
for that position: guesses that are that token stand, and the first that is not is replaced by it. So the answer is the
one without speculation, token by token, at any temperature and with every parameter; only its speed can differ. The
chance that a guess stands is at least (1 - d) / (1 + d), for two models whose distributions differ by d in total
variation (arXiv:2408.07978); rejection sampling would reach 1 - d, with answers that depend on the draft model.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.draft_controller import Acceptance, DraftController
from engine.draft_model import DraftModel
from engine.ngram import NgramIndex
from engine.sequence import Sequence
from engine.step import Step, StepResult


@dataclass(slots=True)
class Drafting:
    """What is kept for one sequence."""

    acceptance: Acceptance = field(default_factory=Acceptance)
    ngrams: NgramIndex = field(default_factory=NgramIndex)


class Speculator:
    """Decides about guesses before a step is scheduled, makes them before it runs, learns from it afterwards.

    max_num_drafts: most guesses of one sequence in a step.
    draft_model: who guesses; the sequence's own text if None.
    is_adaptive: choose how many pay; else always as many as there can be.
    num_wanted: guesses that the last plan asked for.
    """

    def __init__(self, max_num_drafts: int, draft_model: DraftModel | None = None, *, is_adaptive: bool = True) -> None:
        self.max_num_drafts = max_num_drafts
        self.draft_model = draft_model
        self.is_adaptive = is_adaptive
        self.controller = DraftController()
        self.num_wanted = 0

    def plan(self, running: Iterable[Sequence]) -> None:
        """Set how many tokens of each running sequence are to be guessed in the next step."""
        decoding = []
        for sequence in running:
            sequence.num_draft_tokens = 0
            if sequence.num_uncomputed_tokens == 1:
                decoding.append(sequence)
        available: dict[int, int] = {}
        for sequence in decoding:
            if sequence.drafting is None:
                sequence.drafting = Drafting()
            if self.draft_model is None:
                drafts = sequence.drafting.ngrams.propose(sequence.token_ids, self.max_num_drafts)
                sequence.draft_token_ids = drafts
                if drafts:
                    available[sequence.id] = len(drafts)
            else:
                available[sequence.id] = self.max_num_drafts
        chosen = available
        if self.is_adaptive:
            acceptance = {sequence.id: sequence.drafting.acceptance for sequence in decoding if sequence.drafting}
            chosen = self.controller.choose(available, acceptance, len(decoding))
        for sequence in decoding:
            sequence.num_draft_tokens = chosen.get(sequence.id, 0)
        self.num_wanted = sum(chosen.values())

    def propose(self, step: Step) -> float:
        """Make the guesses that the step is to verify; returns the seconds that took."""
        if self.draft_model is None:
            return 0.0
        started = time.perf_counter()
        guessing = [work.sequence for work in step.work if work.num_drafts]
        behind = any(len(sequence.token_ids) - sequence.num_drafter_tokens > 2 for sequence in guessing)
        runs = self.draft_model.propose(step)
        seconds = time.perf_counter() - started
        if runs and not behind:
            self.controller.draft.observe(len(guessing), seconds / runs)
        return seconds

    def observe(self, step: Step, result: StepResult, seconds: float) -> tuple[int, ...]:
        """Learn from a step that was committed and took `seconds` to verify. How many guesses stood, by their place."""
        stood = [0] * self.max_num_drafts
        num_drafts = 0
        for work in step.work:
            sequence = work.sequence
            sequence.num_drafter_tokens = min(sequence.num_drafter_tokens, sequence.num_computed_tokens)
            if not work.num_drafts:
                continue
            num_right = len(result.token_ids[sequence.id]) - 1
            num_drafts += work.num_drafts
            if sequence.drafting is not None:
                sequence.drafting.acceptance.observe(work.num_drafts, num_right)
            for place in range(num_right):
                stood[place] += 1
        if step.work and all(work.samples and work.num_tokens == 1 + work.num_drafts for work in step.work):
            self.controller.verify.observe(step.num_tokens, seconds)
        return tuple(stood) if num_drafts else ()
