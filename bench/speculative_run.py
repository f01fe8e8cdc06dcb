"""Runs of prompts with and without a speculator on one engine, and the costs of their steps."""

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from dispec.engine.api.llm import LLM
from dispec.engine.execution.pending_step import DeviceDrafts
from dispec.engine.execution.sampler import SamplerFunctions
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.scheduler_output import SchedulerOutput
from dispec.engine.scheduling.sequence import Sequence as EngineSequence
from dispec.engine.scheduling.step_record import StepRecord
from dispec.engine.speculation.proposer import Proposal, Proposer
from dispec.engine.speculation.speculator import Speculator

# Tokens of each sequence in a turn. On CUDA a change of turns empties the queue of steps.
_TURN = {"cpu": 2, "cuda": 32}


class SimulatedProposer:
    """Proposes draft tokens that are accepted with a given probability each.

    proposer: runs for what it costs; its draft tokens are replaced. None: draft tokens cost nothing.
    answers: the tokens of prompt and answer, by sequence id.
    """

    def __init__(self, proposer: Proposer | None, acceptance_rate: float, vocab_size: int, seed: int) -> None:
        self._proposer = proposer
        self._acceptance_rate = acceptance_rate
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self.answers: dict[int, list[int]] = {}

    def prepare(self, sequence: EngineSequence, max_drafts: int) -> int:
        """Return `max_drafts`."""
        return max_drafts

    def num_missing_tokens(self, sequence: EngineSequence) -> int:
        """Return the number of tokens that the proposer has to compute first."""
        return self._proposer.num_missing_tokens(sequence) if self._proposer is not None else 0

    def compile_pieces(self, sampler: SamplerFunctions) -> Iterator[None]:
        """Do nothing: the proposer is compiled with its engine."""
        return iter(())

    def propose(self, step: SchedulerOutput) -> Proposal:
        """Set each draft token to the answer's, or, with the probability of a rejection, to another one.

        Tokens on the device are replaced there: the host waits as little as without the simulation.
        """
        proposal = self._proposer.propose(step) if self._proposer is not None else Proposal()
        drafts = {
            scheduled.sequence: self._draft(scheduled.sequence, scheduled.num_draft_tokens)
            for scheduled in step.scheduled_sequences
            if scheduled.num_draft_tokens
        }
        if (device := proposal.device_drafts) is None:
            for sequence, draft in drafts.items():
                sequence.draft.token_ids = draft
            return proposal
        num_columns = device.token_ids.shape[1]
        rows = [drafts[sequence] + [0] * (num_columns - count) for sequence, count in device.num_draft_tokens.items()]
        with torch.inference_mode():
            device.token_ids.copy_(torch.tensor(rows, pin_memory=True), non_blocking=True)
            replaced = DeviceDrafts(device.num_draft_tokens, device.token_ids, device.started)
        return proposal._replace(device_drafts=replaced)

    def _draft(self, sequence: EngineSequence, count: int) -> list[int]:
        rest = self.answers[sequence.id][len(sequence.token_ids) :][:count]
        rest += [0] * (count - len(rest))
        return [
            token if self._random.random() < self._acceptance_rate else (token + 1) % self._vocab_size for token in rest
        ]


class Run(NamedTuple):
    """A run of several prompts.

    seconds: to the end of the last answer.
    full_batch_seconds: estimate of `seconds`, had all tokens come as fast as while all answers were running. The other
        values are of that time too.
    tokens: the answer of each prompt.
    step_seconds, draft_seconds: means per step, and of that for its draft tokens.
    num_drafts, num_draft_tokens: drafts verified, and tokens in them.
    num_accepted_per_position: accepted draft tokens by their position in a draft.
    """

    seconds: float
    full_batch_seconds: float
    tokens: list[list[int]]
    step_seconds: float
    draft_seconds: float
    num_drafts: int
    num_draft_tokens: int
    num_accepted_per_position: list[int]
    records: list[StepRecord]


class _Group:
    """Sequences that decode with one speculator or none, in turns with other groups of the same prompts."""

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
        self._running: list[EngineSequence] = []
        self._seconds = self._full_batch_seconds = 0.0
        self._records: list[StepRecord] = []  # of the steps in which the sequences of all groups ran
        self._num_counted = 0
        with self._turn():
            self._sequences = [self._engine.add(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
            if speculator is not None and isinstance(speculator.proposer, SimulatedProposer) and answers is not None:
                speculator.proposer.answers = {
                    sequence.id: prompt + answer
                    for sequence, prompt, answer in zip(self._sequences, prompts, answers, strict=True)
                }
            while any(not sequence.num_output_tokens for sequence in self._sequences):
                self._engine.step()
        self.num_first_tokens = self._num_tokens

    @property
    def _num_tokens(self) -> int:
        return sum(sequence.num_output_tokens for sequence in self._sequences)

    @property
    def is_full(self) -> bool:
        """Whether no sequence has ended."""
        return not any(sequence.finish_reason for sequence in self._sequences)

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        engine, own_speculator = self._engine, self._engine.speculator
        engine.speculator, engine.scheduler.running = self._speculator, self._running
        try:
            yield
        finally:
            self._running, engine.scheduler.running = engine.scheduler.running, []
            engine.speculator = own_speculator

    def decode(self, num_tokens: int, *, is_full: bool) -> None:
        """Decode until the group has `num_tokens` tokens or ends. is_full: stop when one of its sequences ends."""
        with self._turn():
            started = time.perf_counter()
            while self._engine.has_work and self._num_tokens < num_tokens and (self.is_full or not is_full):
                self._engine.step()
                if is_full:
                    self._records.append(self._engine.records[-1])
            seconds = time.perf_counter() - started
        self._seconds += seconds
        if is_full:
            self._full_batch_seconds += seconds
            self._num_counted = self._num_tokens - self.num_first_tokens

    def result(self) -> Run:
        """Return what was measured."""
        tokens = [list(sequence.output_token_ids) for sequence in self._sequences]
        num_accepted = [0] * self._engine.options.num_speculative_tokens
        for record in self._records:
            for position, count in enumerate(record.num_accepted_per_position):
                num_accepted[position] += count
        return Run(
            self._seconds,
            self._full_batch_seconds * sum(map(len, tokens)) / self._num_counted,
            tokens,
            statistics.fmean(record.seconds for record in self._records),
            statistics.fmean(record.draft for record in self._records),
            sum(record.num_drafts for record in self._records),
            sum(record.num_draft_tokens for record in self._records),
            num_accepted,
            self._records,
        )


def take_turns(
    llm: LLM,
    prompts: list[list[int]],
    params: list[SamplingParams],
    speculators: Sequence[Speculator | None],
    answers: list[list[int]] | None = None,
) -> list[Run]:
    """Run all prompts at once with each speculator, timed from the first token of each.

    The groups take turns of a few tokens, so that other load on the machine affects all of them alike.
    answers: of the prompts, for simulated draft tokens.
    """
    groups = [_Group(llm, speculator, prompts, params, answers) for speculator in speculators]
    is_full, num_tokens, turn = True, groups[0].num_first_tokens, 0
    while any(group.has_work for group in groups):
        num_tokens += _TURN[llm.engine.device.type] * len(prompts)
        # The order alternates: a group finds the caches as the one before it left them.
        for group in groups if turn % 2 else reversed(groups):
            if group.has_work:
                group.decode(num_tokens, is_full=is_full)
        turn += 1
        is_full = is_full and all(group.is_full for group in groups)
    return [group.result() for group in groups]


def first_differences(answers: list[list[int]], others: list[list[int]]) -> list[int]:
    """Return the place of the first token that differs, of each answer that does."""
    return [
        next(
            (place for place, (one, other) in enumerate(zip(*pair, strict=False)) if one != other), min(map(len, pair))
        )
        for pair in zip(answers, others, strict=True)
        if pair[0] != pair[1]
    ]


def separate_logits(llm: LLM) -> None:
    """Let the embedding of random weights outweigh what the layers add to it, so that few logits are near ties.

    The two largest of 152,000 random logits lie so close that bf16 orders 1 token in 25 differently in a batch of
    another size. Simulated draft tokens would then be rejected from that token on.
    """
    embedding = llm.engine.runner.weights.embedding
    if isinstance(embedding, torch.Tensor):
        with torch.inference_mode():
            embedding.mul_(2.0**14)


class Costs(NamedTuple):
    """Median seconds of a step that only decodes, and of verification and draft by the draft tokens per sequence."""

    decode: float
    verify: dict[int, float]
    draft: dict[int, float]


def measure_costs(llm: LLM, proposer: Proposer | None, prompts: list[list[int]], max_num_draft_tokens: int) -> Costs:
    """Measure steps of these sequences, in answers of a hundred tokens that accept all draft tokens."""
    params = [SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)] * len(prompts)
    plain = take_turns(llm, prompts, params, [None])[0]
    verify, draft = {}, {}
    for count in range(1, max_num_draft_tokens + 1):
        simulated = SimulatedProposer(proposer, 1.0, llm.engine.config.vocab_size, seed=0)
        run = take_turns(llm, prompts, params, [Speculator(count, simulated, is_adaptive=False)], plain.tokens)[0]
        full = [record for record in run.records if record.num_draft_tokens == count * len(prompts)][1:]
        draft[count] = statistics.median(record.draft for record in full)
        verify[count] = statistics.median(record.seconds - record.draft for record in full)
    return Costs(statistics.median(record.seconds for record in plain.records), verify, draft)


def predicted_speedup(acceptance: float, num_draft_tokens: int, decode: float, verify: float, draft: float) -> float:
    """Return tokens per second with draft tokens over those without (arXiv:2211.17192, theorem 3.8).

    decode, verify, draft: seconds of a step without draft tokens, of one that verifies them, of proposing them.
    """
    expected = sum(acceptance**position for position in range(num_draft_tokens + 1))
    return expected * decode / (verify + draft)
