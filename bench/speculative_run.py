"""Prompts run to their ends with a speculator or without, and what their steps cost: what `bench.spec` compares."""

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from dispec.engine.api.llm import LLM
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.scheduler_output import SchedulerOutput
from dispec.engine.scheduling.step_record import StepRecord
from dispec.engine.speculation.draft_model import DraftModel, Proposal
from dispec.engine.speculation.speculator import Speculator

_TURN = 2  # tokens of each sequence


class SimulatedDrafts(DraftModel):
    """A draft model whose guesses are right with a probability of our choice. Where there is none, guesses cost
    nothing.

    answers: the tokens of prompt and answer, by sequence id.
    """

    def __init__(self, draft_model: DraftModel | None, acceptance: float, vocab_size: int, seed: int) -> None:
        self._draft_model = draft_model
        self._acceptance = acceptance
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self.answers: dict[int, list[int]] = {}

    def propose(self, step: SchedulerOutput) -> Proposal:
        proposal = self._draft_model.propose(step) if self._draft_model is not None else Proposal(0)
        if proposal.drafts is not None:
            proposal.drafts.wait()
        for scheduled in step.scheduled_sequences:
            if scheduled.num_drafts:
                at = len(scheduled.sequence.token_ids)
                truth = self.answers[scheduled.sequence.id][at : at + scheduled.num_drafts]
                truth += [0] * (scheduled.num_drafts - len(truth))
                wrong = list(truth)
                for place, token in enumerate(truth):
                    if self._random.random() >= self._acceptance:
                        wrong[place] = (token + 1) % self._vocab_size
                scheduled.sequence.draft.token_ids = wrong
        return Proposal(proposal.runs)


class Run(NamedTuple):
    """A workload, once.

    seconds: to the end of the last answer. together: what they would be, had all tokens come as fast as those while all
    answers were under way; what follows is of that time too. step_seconds, draft_seconds: of a step, and of them for
    guesses, on average. drafts, guesses: how many. stood: guesses by place that stood. records: of those steps.
    tokens: each prompt's answer.
    """

    seconds: float
    together: float
    tokens: list[list[int]]
    step_seconds: float
    draft_seconds: float
    drafts: int
    guesses: int
    stood: list[int]
    records: list[StepRecord]


class _Group:
    """Sequences of the same prompts, decoded with one speculator or none, in turns with others.

    seconds: of all turns. together, records: while all sequences of each group were under way, when there were
    `counted` tokens.
    """

    def __init__(
        self,
        llm: LLM,
        speculator: Speculator | None,
        prompts: list[list[int]],
        params: list[SamplingParams],
        answers: list[list[int]] | None,
    ) -> None:
        self._engine = llm.engine
        self._speculator = speculator
        self.seconds = self.together = 0.0
        self.records: list[StepRecord] = []
        self.counted = 0
        with self._turn():
            self.sequences = [self._engine.add(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
            if speculator is not None and isinstance(speculator.draft_model, SimulatedDrafts) and answers is not None:
                whole = (prompt + answer for prompt, answer in zip(prompts, answers, strict=True))
                speculator.draft_model.answers = {one.id: text for one, text in zip(self.sequences, whole, strict=True)}
            while any(not sequence.num_output_tokens for sequence in self.sequences):
                self._engine.step()
        self.before = self.num_tokens

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_output_tokens for sequence in self.sequences)

    @property
    def all_run(self) -> bool:
        return not any(sequence.finish_reason for sequence in self.sequences)

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        engine, kept = self._engine, self._engine.speculator
        engine.speculator = self._speculator
        try:
            yield
        finally:
            self._running, engine.scheduler.running = engine.scheduler.running, []
            engine.speculator = kept

    def go_on(self, until: int, *, together: bool) -> None:
        """Decode until there are so many tokens or nothing is left to do."""
        engine = self._engine
        engine.scheduler.running = self._running
        with self._turn():
            started = time.perf_counter()
            while engine.has_work and self.num_tokens < until and (self.all_run or not together):
                engine.step()
                if together:
                    self.records.append(engine.records[-1])
            seconds = time.perf_counter() - started
        self.seconds += seconds
        if together:
            self.together += seconds
            self.counted = self.num_tokens - self.before

    def result(self) -> Run:
        tokens = [list(sequence.output_token_ids) for sequence in self.sequences]
        stood = [0] * self._engine.options.num_speculative_tokens
        for record in self.records:
            for place, count in enumerate(record.num_accepted_per_position):
                stood[place] += count
        return Run(
            self.seconds,
            self.together * sum(map(len, tokens)) / self.counted,
            tokens,
            statistics.fmean(record.seconds for record in self.records),
            statistics.fmean(record.draft for record in self.records),
            sum(record.num_drafts for record in self.records),
            sum(record.num_draft_tokens for record in self.records),
            stood,
            self.records,
        )


def take_turns(
    llm: LLM,
    prompts: list[list[int]],
    params: list[SamplingParams],
    speculators: Sequence[Speculator | None],
    answers: list[list[int]] | None = None,
) -> list[Run]:
    """All prompts at once with each speculator, timed from when each has its first token: guesses are for decoding.

    They take turns of a few tokens, so that whatever the machine does otherwise hits all of them. answers: of the
    prompts, for guesses that are simulated.
    """
    groups = [_Group(llm, speculator, prompts, params, answers) for speculator in speculators]
    together, until, turns = True, groups[0].before, 0
    while any(group.has_work for group in groups):
        until += _TURN * len(prompts)
        # Who goes first changes: the second finds caches as the first left them.
        for group in groups if turns % 2 else reversed(groups):
            if group.has_work:
                group.go_on(until, together=together)
        turns += 1
        together = together and all(group.all_run for group in groups)
    return [group.result() for group in groups]


class Costs(NamedTuple):
    """Median seconds of so many sequences: a step that only decodes, one that verifies, a guess of each sequence.

    verify, draft: by the number of guesses of each sequence.
    """

    decode: float
    verify: dict[int, float]
    draft: dict[int, float]


def measure_costs(llm: LLM, draft_model: DraftModel | None, prompts: list[list[int]], most: int) -> Costs:
    """What steps of these sequences cost, from answers of a hundred tokens, all of whose guesses stand."""
    params = [SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)] * len(prompts)
    plain = take_turns(llm, prompts, params, [None])[0]
    verify, draft = {}, {}
    for count in range(1, most + 1):
        simulated = SimulatedDrafts(draft_model, 1.0, llm.engine.config.vocab_size, seed=0)
        found = take_turns(llm, prompts, params, [fixed(count, simulated)], plain.tokens)[0]
        full = [record for record in found.records if record.num_draft_tokens == count * len(prompts)][1:]
        draft[count] = statistics.median(record.draft for record in full)
        verify[count] = statistics.median(record.seconds - record.draft for record in full)
    return Costs(statistics.median(record.seconds for record in plain.records), verify, draft)


def fixed(count: int, drafts: DraftModel) -> Speculator:
    """Always so many guesses."""
    return Speculator(count, drafts, is_adaptive=False)
