"""Outputs of grammars do not depend on preemption, failures, prefixes, other engines or ranks."""

import random

import pytest

from dispec import LLM, SamplingParams
from tests.checkpoints import save_tiny
from tests.grammar_cases import FORM, check_text, grammar_params, text_of
from tests.small_engine import alone, make, random_prompts, random_tokens
from tests.test_kv_connector import Network, Pair

_BLOCK_BYTES = 24 * 1024  # of all three layers; a draft model has one


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("qwen3")
    save_tiny(found, "qwen3")
    return found


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    found = tmp_path_factory.mktemp("other")
    save_tiny(found, "qwen3", num_hidden_layers=1, seed=7)
    return found


@pytest.fixture(scope="module")
def plain(directory) -> LLM:
    return make(directory)


@pytest.fixture(scope="module")
def cases() -> tuple[list[list[int]], list[SamplingParams]]:
    """Outputs that end by themselves, and outputs that are closed; with and without logprobs."""
    return random_prompts(20, longest=20), grammar_params(20, max_tokens=40, min_tokens=0)


@pytest.fixture(scope="module")
def expected(plain, cases) -> list[list[int]]:
    found = alone(plain, *cases)
    for index, token_ids in enumerate(found):
        check_text(index, text_of(plain, token_ids))
    return found


@pytest.mark.parametrize(("proposer", "overlaps"), [(None, False), (None, True), ("ngram", True), ("other", False)])
def test_preemption_changes_nothing(directory, other, cases, expected, proposer, overlaps):
    """A trace of arrivals and aborts on a cache that is too small, in steps of few tokens."""
    prompts, params = cases
    rng = random.Random(3)
    model = {"other": other}.get(proposer, proposer)
    llm = make(
        directory,
        speculative_model=model,
        async_scheduling=overlaps,
        max_num_batched_tokens=96,
        max_num_seqs=12,
        max_model_len=80,
        kv_cache_memory=8 * _BLOCK_BYTES * (4 if model == other else 3) // 3,
    )
    engine = llm.engine
    if engine.speculator is not None:
        engine.speculator.is_adaptive = False
    order = rng.sample(range(20), 20)
    sequences, outputs, num_preempted = {}, {}, 0
    while order or engine.has_work:
        for _ in range(rng.randrange(9)):
            if order:
                index = order.pop()
                sequences[index] = engine.add(prompts[index], params[index])
        if rng.random() < 0.05:
            engine.abort(engine.add(prompts[0], params[1]))
        if engine.scheduler.running and rng.random() < 0.15:
            engine.scheduler._preempt(rng.choice(engine.scheduler.running))  # while a step may be under way
            num_preempted += 1
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output.token_id)
        engine.scheduler.check()
    assert num_preempted > 3
    for index, sequence in sequences.items():
        assert sequence.output_token_ids == outputs[sequence.request_id] == expected[index], index
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def test_a_failed_step_changes_nothing_for_the_others(directory, cases, expected):
    prompts, params = cases
    engine = make(directory).engine
    sequences = [engine.add(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
    sample, steps = engine.runner.sampler.sample, []

    def failing(*given):
        steps.append(len(given[0]))
        if steps[-1] > 1 and len(steps) % 20 == 3:
            raise MemoryError("injected")
        return sample(*given)

    engine.runner.sampler.sample = failing
    tokens = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).append(output.token_id)
        engine.scheduler.check()
    assert len(steps) > 23
    assert [sequence.output_token_ids for sequence in sequences] == expected
    assert [tokens[sequence.request_id] for sequence in sequences] == expected


def test_an_output_found_in_the_cache_goes_on_as_before(directory, plain):
    """Blocks that a closing rewrote, or that forced tokens filled, are not found under other tokens."""
    llm = make(directory)
    structure = {"regex": "(Name: [a-z]{1,30}\n)+"}
    for logprobs in (None, 0):
        for max_tokens in range(20, 40, 3):
            params = SamplingParams(
                temperature=1, seed=0, max_tokens=max_tokens, logprobs=logprobs, structured_outputs=structure
            )
            first = llm.generate([random_tokens(20)], params)[0]
            longer = first.prompt_token_ids + first.outputs[0].token_ids + random_tokens(3)
            free = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            assert alone(llm, [longer], free) == alone(plain, [longer], free)
            llm.engine.scheduler.check()


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("shortens", [False, True])
def test_an_output_that_another_engine_began(directory, plain, front, shortens):
    """The first engine knows the whole limit: its token leaves room to close the output."""
    prompts = random_prompts(8, 40)
    params = [
        SamplingParams(
            temperature=1,
            seed=index,
            n=1 + index % 2,
            max_tokens=9 if shortens else 50,
            logprobs=0 if index % 3 == 0 else None,
            structured_outputs={"regex": "[0-9 ]{5,40}z" if shortens else FORM},
        )
        for index in range(8)
    ]
    expected = [[choice.token_ids for choice in one.outputs] for one in plain.generate(prompts, params)]
    pair = Pair(directory, Network(), front=front)
    for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
        pair.add(f"r{index}", prompt, param)
    pair.run()
    assert pair.answers() == expected


def test_a_request_that_moves_to_another_engine_at_any_token(directory, plain):
    """Also between two forced tokens, of which the client has seen the first alone, and in reasoning."""
    structure = {"regex": FORM, "reasoning_start_token_ids": (5, 6), "reasoning_end_token_ids": (301, 302)}
    prompt = random_tokens(20)
    for logprobs in (None, 0):
        params = SamplingParams(
            temperature=1,
            seed=1,
            max_tokens=45,
            logprobs=logprobs,
            logit_bias={301: 14.0, 302: 14.0},
            structured_outputs=structure,
        )
        expected = alone(plain, [prompt], params)[0]
        engine = plain.engine
        for size in range(0, len(expected), 1 if logprobs is None else 5):
            sequence = engine.add(prompt, params, is_resumed=True)
            engine.resume(sequence, [expected[:size]])
            tokens = list(expected[:size])
            while engine.has_work:
                tokens += [output.token_id for output in engine.step()]
                engine.scheduler.check()
            assert tokens == sequence.output_token_ids == expected, size


def test_two_ranks(directory, cases, expected):
    prompts, params = cases
    llm = make(directory, tensor_parallel_size=2, speculative_model="ngram")
    try:
        assert [completion.outputs[0].token_ids for completion in llm.generate(prompts, params)] == expected
    finally:
        llm.close()
