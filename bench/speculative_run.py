"""Prompts run to their ends with a speculator or without, and what their steps cost: what `bench.spec` compares."""

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from engine import LLM, SamplingParams
from engine.draft_model import DraftModel, Proposal
from engine.speculation import Speculator
from engine.step import Step


class SimulatedDrafts:
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

    def propose(self, step: Step) -> Proposal:
        proposal = self._draft_model.propose(step) if self._draft_model is not None else Proposal(0)
        if proposal.guesses is not None:
            proposal.guesses.wait()
        for work in step.work:
            if work.num_drafts:
                at = len(work.sequence.token_ids)
                truth = self.answers[work.sequence.id][at : at + work.num_drafts]
                truth += [0] * (work.num_drafts - len(truth))
                wrong = list(truth)
                for place, token in enumerate(truth):
                    if self._random.random() >= self._acceptance:
                        wrong[place] = (token + 1) % self._vocab_size
                work.sequence.draft_token_ids = wrong
        return Proposal(proposal.runs)


class Run(NamedTuple):
    """A workload, once.

    seconds: to the end of the last answer. together: what they would be, had all tokens come as fast as those while all
    answers were under way; what follows is of that time too. step_seconds, draft_seconds: of a step, and of them for
    guesses, on average. drafts, guesses: how many. stood: guesses by place that stood. tokens: each prompt's answer.
    """

    seconds: float
    together: float
    tokens: list[list[int]]
    step_seconds: float
    draft_seconds: float
    drafts: int
    guesses: int
    stood: list[int]


def run(
    llm: LLM,
    prompts: list[list[int]],
    params: list[SamplingParams],
    simulated: SimulatedDrafts | None = None,
    answers: list[list[int]] | None = None,
) -> Run:
    """All prompts at once, timed from when each has its first token: what speculation changes is decoding."""
    engine = llm.engine
    engine.records.clear()
    sequences = [engine.add(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    if simulated is not None and answers is not None:
        simulated.answers = {
            sequence.id: prompt + answer for sequence, prompt, answer in zip(sequences, prompts, answers, strict=True)
        }
    while any(not sequence.num_output_tokens for sequence in sequences):
        engine.step()
    before = sum(sequence.num_output_tokens for sequence in sequences)
    started, steps = time.perf_counter(), len(engine.records)
    while not any(sequence.finish_reason for sequence in sequences):
        engine.step()
    together = time.perf_counter() - started
    counted = sum(sequence.num_output_tokens for sequence in sequences) - before
    records = list(engine.records)[steps:]
    while engine.has_work:
        engine.step()
    seconds = time.perf_counter() - started
    tokens = [list(sequence.output_token_ids) for sequence in sequences]
    stood = [0] * (engine.options.num_speculative_tokens)
    for record in records:
        for place, count in enumerate(record.num_stood):
            stood[place] += count
    return Run(
        seconds,
        together * sum(map(len, tokens)) / counted,
        tokens,
        statistics.fmean(record.seconds for record in records),
        statistics.fmean(record.draft for record in records),
        sum(record.num_drafts for record in records),
        sum(record.num_draft_tokens for record in records),
        stood,
    )


@contextmanager
def speculating(llm: LLM, speculator: Speculator | None) -> Iterator[None]:
    """With this speculator instead of the engine's own; with none if None."""
    kept = llm.engine.speculator
    llm.engine.speculator = speculator
    try:
        yield
    finally:
        llm.engine.speculator = kept


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
    with speculating(llm, None):
        answers = run(llm, prompts, params).tokens
        decode = statistics.median(record.seconds for record in llm.engine.records if record.kind == "decode")
    verify, draft = {}, {}
    for count in range(1, most + 1):
        simulated = SimulatedDrafts(draft_model, 1.0, llm.engine.config.vocab_size, seed=0)
        with speculating(llm, fixed(count, simulated)):
            run(llm, prompts, params, simulated, answers)
        full = [record for record in llm.engine.records if record.num_draft_tokens == count * len(prompts)][1:]
        draft[count] = statistics.median(record.draft for record in full)
        verify[count] = statistics.median(record.seconds - record.draft for record in full)
    return Costs(decode, verify, draft)


def fixed(count: int, drafts: Any) -> Speculator:
    """Always so many guesses."""
    return Speculator(count, drafts, is_adaptive=False)
