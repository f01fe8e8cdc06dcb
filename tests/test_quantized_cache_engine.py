"""Engines with quantised keys and values: how a sequence got its blocks does not change its tokens."""

import logging
import time

import pytest
import torch

from dispec import LLM, SamplingParams
from dispec.engine.engine import Engine
from dispec.engine.execution.kv_cache_memory import KVPlan, allocate_kv_cache, kv_cache_bytes
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.engine.scheduling.sequence import Sequence, Status
from dispec.ops.cpu.attention import has_cpu_kernel
from dispec.ops.cpu.library import has_packed_linear
from tests.checkpoints import save_tiny
from tests.engine_clients import PATIENCE
from tests.fake_transfer_engine import Network
from tests.small_engine import BLOCK_SIZE, alone, greedy, make, mixed_params, random_prompts, random_tokens
from tests.test_kv_connector import Pair, requests

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
BLOCK_BYTES = 2 * 3 * 3 * (16 + 4) * BLOCK_SIZE  # keys and values, layers, heads, codes and scales


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("llama")
    save_tiny(found, "llama")
    return found


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(directory, kind) -> LLM:
    """Neither shares blocks nor gets them from elsewhere."""
    return make(directory, kv_cache_dtype=kind, enable_prefix_caching=False)


def assert_same(found: list, expected: list) -> None:
    """At most one in eight sequences may have other tokens.

    In float32, sums of other orders differ by 1e-7 of their size. That moves one in 100,000 codes to its neighbour, and
    then the logits of a random model change by up to 1e-2.
    """
    assert len(found) == len(expected)
    assert sum(one != other for one, other in zip(found, expected, strict=True)) <= len(expected) // 8


def test_shared_prefixes_and_copied_blocks(directory, kind, plain):
    llm = make(directory, kv_cache_dtype=kind, max_num_seqs=16)
    prefix = random_tokens(70)
    prompts = [prefix[: 10 * (index % 8)] + random_tokens(5 + index, index) for index in range(16)]
    params = mixed_params(16, max_tokens=12)
    expected = alone(plain, prompts, params)
    for _ in range(2):  # from an empty cache, and from a full one
        assert_same([c.outputs[0].token_ids for c in llm.generate(prompts, params)], expected)
    assert llm.generate([prompts[7]], params[7])[0].num_cached_tokens > 0
    choices = SamplingParams(n=8, seed=100, temperature=1.5, max_tokens=12, ignore_eos=True)
    each = [SamplingParams(seed=100 + i, temperature=1.5, max_tokens=12, ignore_eos=True) for i in range(8)]
    prompt = random_tokens(3 * BLOCK_SIZE + 5)  # the choices copy its last block
    found = llm.generate([prompt], choices)[0].outputs
    assert_same([choice.token_ids for choice in found], alone(plain, [prompt] * 8, each))
    llm.engine.scheduler.check()


def test_preempted_sequences(directory, kind, plain):
    llm = make(directory, kv_cache_dtype=kind, kv_cache_memory=16 * BLOCK_BYTES, max_num_seqs=8)
    assert llm.engine.kv_plan.num_blocks == 16
    prompts, params = random_prompts(8, longest=40), mixed_params(8, max_tokens=40)
    assert_same([c.outputs[0].token_ids for c in llm.generate(prompts, params)], alone(plain, prompts, params))
    assert sum(record.num_preempted for record in llm.engine.records) > 1
    llm.engine.scheduler.check()


@pytest.mark.parametrize("draft", ["itself", "other"])
def test_a_draft_model_with_a_cache_of_its_own(directory, tmp_path, kind, draft):
    if not has_packed_linear():
        pytest.skip("torch's bits depend on the number of rows")
    options = {"kv_cache_dtype": kind, "dtype": "bfloat16"}
    if draft == "other":
        save_tiny(tmp_path, "llama", num_hidden_layers=1, seed=7)
    llm = make(directory, speculative_model=directory if draft == "itself" else tmp_path, **options)
    llm.engine.speculator.is_adaptive = False
    prompts, params = random_prompts(6), mixed_params(6, max_tokens=20)
    expected = make(directory, **options).generate(prompts, params)
    assert [c.outputs[0].token_ids for c in llm.generate(prompts, params)] == [c.outputs[0].token_ids for c in expected]
    caches = [llm.engine.runner.kv_cache, llm.engine.speculator.proposer._runner.kv_cache]
    assert all(cache.keys.dtype is KINDS[kind] for cache in caches)
    if draft == "itself":
        assert sum(sum(record.num_accepted_per_position) for record in llm.engine.records) > 60


@pytest.mark.parametrize("failure", [0.0, 0.2])
def test_blocks_that_another_engine_computed(directory, kind, plain, failure):
    pair = Pair(directory, Network(1, failure=failure), front=True, kv_cache_dtype=kind)
    work = requests(8)
    expected = plain.generate([prompt for prompt, _ in work], [params for _, params in work])
    for number, (prompt, params) in enumerate(work):
        pair.add(f"t{number}", prompt, params)
        pair.step()
    pair.run()
    assert_same(pair.answers(), [[choice.token_ids for choice in one.outputs] for one in expected])
    pair.assert_empty()
    assert pair.network.num_pulled > 0
    if not failure:
        assert sum(record.num_prompt_tokens for record in pair.decode.records) == 0


def run_together(prefill: Engine, decode: Engine, prompt: list[int], params: SamplingParams) -> Sequence:
    """Let one engine compute a prompt and another one go on from its blocks."""
    prefill.add(prompt, params, publish_as="one")
    sequence = decode.add(prompt, params, pull=prefill.kv_connector.transfer_engine.remote_blocks("one"))
    deadline = time.monotonic() + PATIENCE
    while sequence.status is not Status.FINISHED:
        assert time.monotonic() < deadline
        for engine in (prefill, decode):
            engine.work_while_idle()
            if engine.has_work:
                engine.step()
    return sequence


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_transfers_between_caches_of_one_dtype(directory, kind, plain, transport):
    prompt, params = random_tokens(60), greedy(20)
    options = {"kv_cache_dtype": kind, "kv_transfer": transport, "kv_cache_memory": "1MiB"}
    prefill, decode = (make(directory, **options).engine for _ in range(2))
    try:
        sequence = run_together(prefill, decode, prompt, params)
        assert sequence.output_token_ids == plain.generate([prompt], params)[0].outputs[0].token_ids
        assert decode.kv_connector.totals.num_failed_receives == 0
        assert sum(record.num_prompt_tokens for record in decode.records) == 0
    finally:
        prefill.close()
        decode.close()


@pytest.mark.parametrize(
    ("source", "own"),
    [
        ({"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "int8"}),  # blocks of as many bytes
        ({"kv_cache_dtype": "int8", "dtype": "bfloat16"}, {"kv_cache_dtype": "int8"}),
        ({}, {"kv_cache_dtype": "fp8"}),
    ],
)
def test_blocks_of_another_dtype_are_refused_and_computed_again(directory, source, own):
    prompt, params = random_tokens(60), greedy(20)
    both = {"kv_transfer": "tcp", "kv_cache_memory": "1MiB"}
    prefill, decode = (make(directory, **both, **options).engine for options in (source, own))
    try:
        sequence = run_together(prefill, decode, prompt, params)
        assert sequence.output_token_ids == make(directory, **own).generate([prompt], params)[0].outputs[0].token_ids
        assert decode.kv_connector.totals.num_failed_receives == 1
    finally:
        prefill.close()
        decode.close()


def test_ranks_of_a_model(directory, kind, plain):
    prompts, params = random_prompts(8), mixed_params(8, max_tokens=12)
    llm = make(directory, kv_cache_dtype=kind, tensor_parallel_size=2, kv_cache_memory="1MiB")
    try:
        expected = alone(plain, prompts, params)
        for _ in range(2):
            assert_same([c.outputs[0].token_ids for c in llm.generate(prompts, params)], expected)
    finally:
        llm.engine.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_start_log_names_the_dtype_and_steps_stay_fused(directory, kind, dtype, caplog):
    caplog.set_level(logging.INFO)
    llm = make(directory, kv_cache_dtype=kind, dtype=dtype)
    (line,) = [message for message in caplog.messages if "kv cache" in message]
    assert f"{str(KINDS[kind]).removeprefix('torch.')}, {llm.engine.kv_plan.num_blocks - 1} blocks of 16" in line
    assert llm.engine.runner.plan.fuses_layers == (dtype == "bfloat16" and has_packed_linear())
    assert llm.engine.runner.plan.mixes == has_cpu_kernel(KINDS[kind], 16, BLOCK_SIZE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_size_without_a_kernel(tmp_path, kind, dtype):
    save_tiny(tmp_path, "llama", head_dim=24)
    llm = make(tmp_path, kv_cache_dtype=kind, dtype=dtype)
    assert not llm.engine.runner.plan.fuses_layers
    assert not llm.engine.runner.plan.mixes
    prompts = random_prompts(8, longest=24)
    found = [c.outputs[0].token_ids for c in llm.generate(prompts, greedy(6))]
    assert all(len(tokens) == 6 for tokens in found)
    if dtype == "float32":
        other = make(tmp_path, kv_cache_dtype=kind, max_num_batched_tokens=64, block_size=32)
        assert_same(found, alone(other, prompts, greedy(6)))


def test_a_cache_has_the_planned_bytes(directory, kind):
    config = find_checkpoint(directory).config
    plan = KVPlan(5, BLOCK_SIZE, BLOCK_BYTES, 64, "a test")
    cache = allocate_kv_cache(config, plan, KINDS[kind], torch.device("cpu"))
    assert sum(half.nbytes for half in cache) == kv_cache_bytes(config, plan, KINDS[kind]) == 5 * BLOCK_BYTES
