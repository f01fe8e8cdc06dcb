"""The benchmark of speculation: groups of sequences that take turns on one engine."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from dispec import LLM, SamplingParams
from dispec.bench.spec import Rounds, Work, compare
from dispec.bench.speculative_run import (
    SimulatedProposer,
    first_differences,
    measure_costs,
    separate_logits,
    take_turns,
)
from dispec.engine.speculation.ngram import NgramProposer
from dispec.engine.speculation.speculator import Speculator
from tests.checkpoints import save_tiny
from tests.gpu_engine import CONFIG

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], list(range(20, 60))]  # the last one takes two steps


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    directory = tmp_path_factory.mktemp("model")
    save_tiny(directory, "llama")
    return LLM(
        str(directory),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=3,
        max_num_batched_tokens=32,
        speculative_model="ngram",
        max_model_len=256,
    )


def params(*lengths: int) -> list[SamplingParams]:
    return [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]


def test_groups_that_take_turns_give_the_same_answers_as_alone(llm) -> None:
    given = params(20, 40, 31)
    alone = [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, given)]
    simulated = SimulatedProposer(None, 0.5, llm.engine.config.vocab_size, seed=1)
    plain, speculative = take_turns(llm, PROMPTS, given, [None, Speculator(3, simulated, is_adaptive=False)], alone)
    assert plain.tokens == speculative.tokens == alone
    assert not llm.engine.has_work
    assert llm.engine.speculator is not None
    assert isinstance(llm.engine.speculator.proposer, NgramProposer), "the engine's own speculator is back"
    llm.engine.scheduler.check()


def test_only_steps_in_which_all_groups_are_full_count(llm) -> None:
    given = params(20, 40, 31)
    answers = take_turns(llm, PROMPTS, given, [None])[0].tokens
    drafts = [SimulatedProposer(None, chance, llm.engine.config.vocab_size, seed=1) for chance in (1.0, 0.0)]
    right, wrong = take_turns(llm, PROMPTS, given, [Speculator(3, each, is_adaptive=False) for each in drafts], answers)
    # The shortest answer is 20 tokens: four in each step that accepts its draft tokens, one in the others.
    assert right.num_draft_tokens == sum(right.num_accepted_per_position) > 30
    assert len(right.records) <= 6
    assert sum(wrong.num_accepted_per_position) == 0
    assert len(wrong.records) <= 20
    assert all(record.num_sequences == 3 for run in (right, wrong) for record in run.records)
    assert right.full_batch_seconds > 0


def test_a_speculator_that_changes_answers_is_refused(llm, monkeypatch) -> None:
    work = Work("broken", ["Say it again."], 0.0, 1)
    found = compare(llm, Speculator(2, NgramProposer()), work, 12, 2)
    assert len(found.plain) == len(found.speculative) == 2
    monkeypatch.setattr(
        "dispec.bench.spec.take_turns",
        lambda llm, prompts, given, speculators: [
            run._replace(tokens=[[int(one is None)]])
            for run, one in zip(take_turns(llm, prompts, given, speculators), speculators, strict=True)
        ],
    )
    with pytest.raises(RuntimeError, match="broken: answers with speculation differ"):
        compare(llm, Speculator(2, NgramProposer()), work, 12, 1)


def test_where_answers_differ() -> None:
    answers = [[1, 2, 3], [4, 5], [6, 7, 8]]
    assert first_differences(answers, [[1, 2, 3], [4, 9], [6, 7, 8, 9]]) == [1, 3]
    assert first_differences(answers, answers) == []


def test_answers_that_differ_on_cuda_in_16_bits_are_counted(llm) -> None:
    """Steps of several sizes round differently there; this engine only says that it is such a one."""

    def engine(device: str, dtype: str) -> LLM:
        options = SimpleNamespace(dtype=dtype)
        return cast(LLM, SimpleNamespace(engine=SimpleNamespace(device=torch.device(device), options=options)))

    run = take_turns(llm, PROMPTS, params(8, 8, 8), [None])[0]
    found = Rounds([[run]], [[run]], [])
    other = [[*run.tokens[0][:6], 0, 0], *run.tokens[1:]]
    found.compare_answers(engine("cuda", "bfloat16"), "work", run.tokens, run.tokens)
    assert found.describe_differences() == ""
    found.compare_answers(engine("cuda", "bfloat16"), "work", run.tokens, other)
    assert found.describe_differences() == "1 of 3 from token 6"
    for exact in (engine("cpu", "bfloat16"), engine("cuda", "float32")):
        with pytest.raises(RuntimeError, match="work: answers with speculation differ"):
            found.compare_answers(exact, "work", run.tokens, other)


def test_separated_logits_are_no_near_ties() -> None:
    """The largest logit exceeds the second by more than a layer's rounding: the answer follows from the last token."""
    llm = LLM(replace(CONFIG, tie_embeddings=False), load_format="dummy", dtype="float32", enforce_eager=True)
    given = [[5, 6, 7], [40, 41, 42, 43, 7]]
    before = [output.outputs[0].token_ids[0] for output in llm.generate(given, params(1, 1))]
    separate_logits(llm)
    after = [output.outputs[0].token_ids[0] for output in llm.generate(given, params(1, 1))]
    assert after[0] == after[1]
    assert before[0] != before[1]


def test_costs_are_measured_for_each_number_of_draft_tokens(llm) -> None:
    costs = measure_costs(llm, None, PROMPTS, 2)
    assert costs.decode > 0
    assert set(costs.verify) == set(costs.draft) == {1, 2}
    assert all(seconds > 0 for seconds in costs.verify.values())
