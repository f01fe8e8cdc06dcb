"""Steps that are launched before the one before them is known: forced on a CPU, where the logic is the same."""

import pytest
import torch

from dispec import LLM
from dispec.engine.speculation.controller import DraftController
from tests.checkpoints import save_tiny
from tests.small_engine import BLOCK_SIZE, alone, greedy, make, mixed_params, random_prompts, random_tokens

PROMPTS, PARAMS = random_prompts(12, longest=40), mixed_params(12, max_tokens=60)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    save_tiny(directory, "llama")
    return directory


@pytest.fixture(scope="module")
def reference(directory) -> LLM:
    return make(directory, enable_prefix_caching=False, async_scheduling=False)


@pytest.fixture(scope="module")
def llm(directory) -> LLM:
    return make(directory, async_scheduling=True)


def test_a_mixed_batch_equals_each_prompt_alone(llm, reference):
    prompts, params = random_prompts(24), mixed_params(24)
    assert [c.outputs[0].token_ids for c in llm.generate(prompts, params)] == alone(reference, prompts, params)


def test_tokens_lag_one_step_behind_and_none_is_computed_in_vain(llm):
    engine = llm.engine
    sequence = engine.add(random_tokens(5), greedy(4))
    tokens = []
    for _ in range(5):
        tokens.append([output.token_id for output in engine.step()])
    assert tokens == [[], *([token] for token in sequence.output_token_ids)]
    assert not engine.has_work
    assert engine.step() == []
    # Its length is known beforehand, so no step runs past the end.
    assert [record.num_tokens for record in list(engine.records)[-4:]] == [5, 1, 1, 1]


@pytest.fixture(scope="module")
def expected(reference) -> list[list[int]]:
    return alone(reference, PROMPTS, PARAMS)


def test_preemption_and_chunks_under_overlap(directory, expected):
    block_bytes = 2 * 3 * 3 * 16 * BLOCK_SIZE * 4
    small = make(
        directory,
        kv_cache_memory=24 * block_bytes,
        max_num_seqs=12,
        max_num_batched_tokens=24,
        async_scheduling=True,
    )
    assert [c.outputs[0].token_ids for c in small.generate(PROMPTS, PARAMS)] == expected
    assert sum(record.num_preempted for record in small.engine.records) > 3
    small.engine.scheduler.check()


def test_a_stop_token_discards_the_step_that_ran_ahead(llm, reference):
    prompt = random_tokens(20)
    tokens = alone(reference, [prompt], greedy(30))[0]
    stop = tokens[10]
    expected = tokens[: tokens.index(stop) + 1]
    completion = llm.generate([prompt], greedy(30, stop_token_ids=(stop,)))[0]
    assert completion.outputs[0].token_ids == expected
    assert completion.outputs[0].finish_reason == "stop"
    assert completion.outputs[0].stop_reason == stop
    llm.engine.step()
    assert not llm.engine.has_work
    llm.engine.scheduler.check()
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable


def test_abort_while_a_step_is_under_way(llm):
    engine = llm.engine
    first, second = (engine.add(random_tokens(5, seed), greedy(20)) for seed in range(2))
    for _ in range(3):
        engine.step()
    engine.abort(first)
    later = engine.add(random_tokens(200, 3), greedy(5))  # may get the blocks that the running step still writes to
    known = first.output_token_ids
    while engine.has_work:
        assert all(output.request_id != first.request_id for output in engine.step())
    assert first.output_token_ids == known
    assert (second.num_output_tokens, later.num_output_tokens) == (20, 5)
    engine.scheduler.check()


def test_the_device_feeds_a_token_that_the_host_has_not_seen(directory):
    """The host's id of a pending token is wrong on purpose: only the one on the device can give the right output."""
    llm = make(directory, async_scheduling=True)
    prompt = random_tokens(9)
    expected = alone(make(directory), [prompt], greedy(8))[0]
    runner = llm.engine.runner
    launch = runner.launch

    def poisoned(step, *others):
        for host in runner._hosts:
            host.flat.fill_(77)  # what is not written anew by the step must not be read
        return launch(step, *others)

    runner.launch = poisoned
    assert llm.generate([prompt], greedy(8))[0].outputs[0].token_ids == expected
    runner.launch = launch
    sequence = llm.engine.add(prompt, greedy(8))
    for _ in range(3):
        llm.engine.step()
    runner.previous_token_ids += torch.ones_like(runner.previous_token_ids)
    while llm.engine.has_work:
        llm.engine.step()
    assert sequence.output_token_ids != expected, "the fed back token was not read"


class Resting(DraftController):
    """Rests in two steps of three, and else asks for two draft tokens of each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.num_planned = 0

    def is_resting(self, num_sequences: int) -> bool:
        return self.num_planned % 3 > 0

    def choose(self, candidates, num_sequences) -> int:
        num_draft_tokens = 0 if self.is_resting(num_sequences) else 2
        self.num_planned += 1
        return num_draft_tokens


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    directory = tmp_path_factory.mktemp("draft")
    save_tiny(directory, "llama", num_hidden_layers=1)
    return directory


def test_steps_overlap_while_a_draft_model_rests(directory, draft, expected):
    llm = make(directory, speculative_model=draft, async_scheduling=True)
    engine = llm.engine
    engine.speculator.controller = Resting()
    runner, launched = engine.runner, []
    launch = runner.launch

    def watched(step, *drafts):
        num_draft_tokens = sum(scheduled.num_draft_tokens for scheduled in step.scheduled_sequences)
        launched.append((num_draft_tokens, [flight.record.num_draft_tokens for flight in engine._launched]))
        return launch(step, *drafts)

    runner.launch = watched
    sequences = [engine.add(prompt, param) for prompt, param in zip(PROMPTS, PARAMS, strict=True)]
    while engine.has_work:
        engine.step()
    assert [sequence.output_token_ids for sequence in sequences] == expected
    verifying = [in_flight for num_draft_tokens, in_flight in launched if num_draft_tokens]
    assert len(verifying) > 5
    assert not any(verifying), "the plan of draft tokens follows from what the step before sampled"
    behind = [in_flight for _, in_flight in launched if in_flight]
    assert len(behind) > 5
    assert all(in_flight == [0] for in_flight in behind), "how many draft tokens stand decides about the next step"
    assert sum(sum(record.num_accepted_per_position) for record in engine.records) > 10
    engine.scheduler.check()


@pytest.mark.parametrize("proposer", ["ngram", "draft model"])
def test_speculation_changes_no_token_under_overlap(proposer, directory, draft, expected):
    """With the controller that decides by itself, preemption and chunks."""
    block_bytes = 2 * 3 * 3 * 16 * BLOCK_SIZE * 4
    llm = make(
        directory,
        speculative_model=draft if proposer == "draft model" else proposer,
        kv_cache_memory=36 * block_bytes,
        max_num_seqs=12,
        max_num_batched_tokens=24,
        async_scheduling=True,
    )
    assert [c.outputs[0].token_ids for c in llm.generate(PROMPTS, PARAMS)] == expected
    assert sum(record.num_preempted for record in llm.engine.records)
    assert sum(record.num_draft_tokens for record in llm.engine.records)
    llm.engine.scheduler.check()
