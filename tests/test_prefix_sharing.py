"""Sharing computed prefixes, on a real small model: nothing changes but what is computed."""

import pytest

from dispec import LLM, SamplingParams
from tests.checkpoints import save_tiny
from tests.small_engine import BLOCK_SIZE, alone, greedy, make, mixed_params, random_prompts, random_tokens

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    save_tiny(directory, "llama")
    return directory


@pytest.fixture(scope="module")
def reference(directory) -> LLM:
    """Finds nothing in the cache, because it keeps nothing."""
    return make(directory, enable_prefix_caching=False)


@pytest.fixture
def llm(directory) -> LLM:
    return make(directory)


def computed_tokens(llm: LLM) -> int:
    return sum(record.num_prompt_tokens for record in llm.engine.records)


def test_a_second_turn_computes_only_what_is_new(llm, reference):
    first = llm.generate([random_tokens(50)], greedy(30))[0]
    assert first.num_cached_tokens == 0
    conversation = first.prompt_token_ids + first.outputs[0].token_ids
    turn = conversation + random_tokens(20, 7)
    llm.engine.records.clear()
    second = llm.generate([turn], greedy(10))[0]
    # The last token of the first turn was never an input, so its block may lack it.
    cached = (len(conversation) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert second.num_cached_tokens == cached
    assert computed_tokens(llm) == len(turn) - cached
    assert [second.outputs[0].token_ids] == alone(reference, [turn], greedy(10))


@pytest.mark.parametrize("length", [BLOCK_SIZE, 3 * BLOCK_SIZE])
def test_a_prompt_that_is_there_entirely_computes_one_token(llm, reference, length):
    prompt = random_tokens(length)
    expected = alone(reference, [prompt], greedy())[0]
    for cached in (0, length - 1, length - 1):
        llm.engine.records.clear()
        completion = llm.generate([prompt], greedy())[0]
        assert completion.outputs[0].token_ids == expected
        assert completion.num_cached_tokens == cached
        assert computed_tokens(llm) == length - cached


def test_the_same_whole_prompt_many_times_at_once_while_its_owner_runs(llm, reference):
    prompt = random_tokens(2 * BLOCK_SIZE)
    expected = alone(reference, [prompt], greedy(30))[0]
    llm.generate([prompt], greedy(2))
    for completion in llm.generate([prompt] * 6, greedy(30)):
        assert completion.outputs[0].token_ids == expected
        assert completion.num_cached_tokens == len(prompt) - 1
    llm.engine.scheduler.check()


def test_a_mixed_batch_with_shared_prefixes_equals_each_prompt_alone(llm, reference):
    prefix = random_tokens(70)
    prompts = [prefix[: 10 * (index % 8)] + random_tokens(5 + index, index) for index in range(24)]
    params = mixed_params(24)
    expected = alone(reference, prompts, params)
    for _ in range(2):  # from an empty cache, and from a full one
        assert [c.outputs[0].token_ids for c in llm.generate(prompts, params)] == expected
    assert llm.generate([prompts[7]], params[7])[0].num_cached_tokens > 0


def test_preemption_recomputes_from_the_cache_and_changes_nothing(directory, reference):
    """A pool of 23 blocks for 12 sequences of up to seven: they take turns."""
    block_bytes = 2 * 3 * 3 * 16 * BLOCK_SIZE * 4
    small = make(directory, kv_cache_memory=24 * block_bytes, max_num_seqs=12, max_num_batched_tokens=48)
    assert small.engine.kv_plan.num_blocks == 24
    prompts, params = random_prompts(12, longest=40), mixed_params(12, max_tokens=60)
    expected = alone(reference, prompts, params)
    assert [c.outputs[0].token_ids for c in small.generate(prompts, params)] == expected
    records = small.engine.records
    assert sum(record.num_preempted for record in records) > 3
    assert sum(record.num_cached_tokens for record in records) > 0
    small.engine.scheduler.check()
    assert small.engine.scheduler.pool.num_free == 23


def test_a_prompt_as_long_as_the_pool(directory, reference):
    block_bytes = 2 * 3 * 3 * 16 * BLOCK_SIZE * 4
    llm = make(directory, kv_cache_memory=9 * block_bytes)
    assert llm.engine.max_model_len == 8 * BLOCK_SIZE
    prompt = random_tokens(8 * BLOCK_SIZE - 1)
    expected = alone(reference, [prompt], greedy(1))
    for _ in range(3):
        completion = llm.generate([prompt], greedy(5))[0]
        assert [completion.outputs[0].token_ids] == expected
    again = [random_tokens(8 * BLOCK_SIZE - 1, seed) for seed in range(3)]
    assert [c.outputs[0].token_ids for c in llm.generate(again, greedy(5))] == alone(reference, again, greedy(1))
    with pytest.raises(ValueError, match=r"128 tokens, must be below max_model_len \(128\)"):
        llm.generate([random_tokens(8 * BLOCK_SIZE)], greedy(1))


def test_chunked_prefill_of_a_shared_prefix(directory, reference):
    llm = make(directory, max_num_batched_tokens=40, max_prefill_chunk=8, max_num_seqs=8)
    prompts = [random_tokens(100) + random_tokens(index, index) for index in range(1, 9)]
    assert [c.outputs[0].token_ids for c in llm.generate(prompts, mixed_params(8))] == alone(
        reference, prompts, mixed_params(8)
    )
    assert all(record.num_tokens <= 40 for record in llm.engine.records)


def test_a_salt_keeps_prefixes_apart(llm):
    engine = llm.engine
    prompt = random_tokens(64)
    for salt, cached in ((None, 0), (None, 63), ("a", 0), ("a", 63), ("b", 0)):
        sequence = engine.add(prompt, greedy(2), cache_salt=salt)
        while engine.has_work:
            engine.step()
        assert sequence.num_cached_tokens == cached


@pytest.mark.parametrize("n", [2, 5, 40])
def test_several_choices_share_the_prompt_and_differ_as_their_seeds(directory, reference, n):
    llm = make(directory, max_num_seqs=16)
    prompt = random_tokens(3 * BLOCK_SIZE + 5)
    params = SamplingParams(n=n, seed=100, temperature=1.5, max_tokens=20, ignore_eos=True, logprobs=2)
    completion = llm.generate([prompt], params)[0]
    each = [SamplingParams(seed=100 + i, temperature=1.5, max_tokens=20, ignore_eos=True) for i in range(n)]
    assert [choice.token_ids for choice in completion.outputs] == alone(reference, [prompt] * n, each)
    assert len({tuple(choice.token_ids) for choice in completion.outputs}) == n
    assert all(len(choice.logprobs) == 20 for choice in completion.outputs)
    # The prompt once; of each further choice its last token, or, for those that had to wait for room, what is not a
    # full block.
    assert computed_tokens(llm) <= len(prompt) + (n - 1) * (5 + 1)
    assert max(record.num_used_blocks for record in llm.engine.records) <= 3 + 16 * 2
    llm.engine.scheduler.check()


def test_choices_of_preempted_and_chunked_requests(directory, reference):
    block_bytes = 2 * 3 * 3 * 16 * BLOCK_SIZE * 4
    llm = make(directory, kv_cache_memory=20 * block_bytes, max_num_seqs=8, max_num_batched_tokens=16)
    prompts = random_prompts(4, longest=60)
    params = SamplingParams(n=4, seed=3, temperature=1.0, max_tokens=60, ignore_eos=True)
    each = [SamplingParams(seed=3 + i, temperature=1.0, max_tokens=60, ignore_eos=True) for i in range(4)]
    for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
        assert [choice.token_ids for choice in completion.outputs] == alone(reference, [prompt] * 4, each)
    assert sum(record.num_preempted for record in llm.engine.records) > 0


def test_closing_a_stream_of_several_choices_frees_everything(llm):
    params = SamplingParams(n=5, temperature=1.0, max_tokens=50, ignore_eos=True)
    for pieces in (1, 2, 9):
        stream = llm.stream(random_tokens(40, pieces), params)
        for _ in range(pieces):
            next(stream)
        stream.close()
        assert not llm.engine.has_work
        llm.engine.scheduler.check()
        assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable


def test_no_sharing_when_it_is_off(reference):
    prompt = random_tokens(64)
    for _ in range(2):
        assert reference.generate([prompt], greedy(2))[0].num_cached_tokens == 0
