"""How speculation is measured: groups of sequences that take turns on one engine."""

import pytest

from dispec import LLM, SamplingParams
from dispec.bench.spec import Work, compare
from dispec.bench.speculative_run import SimulatedDrafts, fixed, measure_costs, take_turns
from dispec.engine.speculation.speculator import Speculator
from tests.checkpoints import save_tiny

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


def test_groups_that_take_turns_give_the_answers_that_each_would_give_alone(llm) -> None:
    given = params(20, 40, 31)
    alone = [list(output.token_ids) for output in llm.generate(PROMPTS, given)]
    simulated = SimulatedDrafts(None, 0.5, llm.engine.config.vocab_size, seed=1)
    plain, guessing = take_turns(llm, PROMPTS, given, [None, fixed(3, simulated)], alone)
    assert plain.tokens == guessing.tokens == alone
    assert not llm.engine.has_work
    assert llm.engine.speculator is not None
    assert llm.engine.speculator.draft_model is None  # as it was
    llm.engine.scheduler.check()


def test_only_what_all_groups_have_under_way_counts(llm) -> None:
    given = params(20, 40, 31)
    answers = take_turns(llm, PROMPTS, given, [None])[0].tokens
    drafts = [SimulatedDrafts(None, chance, llm.engine.config.vocab_size, seed=1) for chance in (1.0, 0.0)]
    right, wrong = take_turns(llm, PROMPTS, given, [fixed(3, each) for each in drafts], answers)
    # The shortest answer is 20 tokens: four in each step whose guesses are right, one where they are wrong.
    assert right.guesses == sum(right.stood) > 30
    assert len(right.records) <= 6
    assert sum(wrong.stood) == 0
    assert len(wrong.records) <= 20
    assert all(record.num_sequences == 3 for run in (right, wrong) for record in run.records)
    assert right.together > 0


def test_a_speculator_that_changes_answers_is_found_out(llm, monkeypatch) -> None:
    work = Work("broken", ["Say it again."], 0.0, 1)
    plain, spec = compare(llm, Speculator(2), work, 12, 2)
    assert len(plain) == len(spec) == 2
    monkeypatch.setattr(
        "dispec.bench.spec.take_turns",
        lambda llm, prompts, given, speculators: [
            run._replace(tokens=[[int(one is None)]])
            for run, one in zip(take_turns(llm, prompts, given, speculators), speculators, strict=True)
        ],
    )
    with pytest.raises(RuntimeError, match="broken: answers with speculation differ"):
        compare(llm, Speculator(2), work, 12, 1)


def test_costs_are_of_steps_with_so_many_guesses(llm) -> None:
    costs = measure_costs(llm, None, PROMPTS, 2)
    assert costs.decode > 0
    assert set(costs.verify) == set(costs.draft) == {1, 2}
    assert all(seconds > 0 for seconds in costs.verify.values())
