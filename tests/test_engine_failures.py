"""An error inside a step ends the request that causes it, and no other."""

import pytest

from dispec import LLM
from tests.checkpoints import save_tiny
from tests.small_engine import alone, greedy, make, mixed_params, random_prompts, random_tokens

POISON = 499


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    save_tiny(directory, "llama")
    return directory


_KINDS = {
    "one by one": {"async_scheduling": False},
    "overlapping": {"async_scheduling": True},
    "overlapping with draft tokens": {"async_scheduling": True, "speculative_model": "ngram"},
}


@pytest.fixture(params=_KINDS)
def llm(request, directory) -> LLM:
    return make(directory, **_KINDS[request.param])


def fail_on(llm: LLM, is_poisoned) -> None:
    """Let a step fail in the middle of a launch if any of its sequences `is_poisoned`."""
    sample = llm.engine.runner.sampler.sample

    def failing(work, *arguments):
        if any(is_poisoned(item.sequence) for item in work):
            raise MemoryError("injected")
        return sample(work, *arguments)

    llm.engine.runner.sampler.sample = failing


def test_the_others_go_on_as_if_nothing_had_been(llm, directory):
    prompts, params = random_prompts(8), mixed_params(8)
    expected = alone(make(directory), prompts, params)
    engine = llm.engine
    fail_on(llm, lambda sequence: sequence.token_ids[0] == POISON)
    sequences = [engine.add(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
    for _ in range(4):
        engine.step()
    guilty = engine.add([POISON, 1, 2], greedy(5))
    tokens = {sequence.request_id: sequence.output_token_ids for sequence in sequences}
    failed = []
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
        failed += engine.failed
    assert failed == [guilty]
    assert (guilty.finish_reason, guilty.error) == ("error", "MemoryError: injected")
    assert [sequence.output_token_ids for sequence in sequences] == expected
    assert [tokens[sequence.request_id] for sequence in sequences] == expected, (
        "a token was reported twice or not at all"
    )
    engine.scheduler.check()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def test_a_sequence_that_fails_alone(llm):
    fail_on(llm, lambda sequence: sequence.num_output_tokens == 3)
    with pytest.raises(RuntimeError, match="the engine failed: MemoryError: injected"):
        llm.generate([random_tokens(5)], greedy(9))
    assert not llm.engine.has_work
    assert len(llm.generate([random_tokens(5)], greedy(2))[0].outputs[0].token_ids) == 2


def test_an_error_of_all_is_no_request_s_fault(llm):
    fail_on(llm, lambda _: True)
    with pytest.raises(MemoryError, match="injected"):
        llm.generate(random_prompts(3), greedy(5))
