"""Tensor parallelism: the ranks' parts are the whole, and so are their answers."""

import gc
import math
import os
import select
import signal
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from dispec.engine.api.llm import LLM
from dispec.engine.api.outputs import TokenLogprobs
from dispec.engine.distributed import tensor_parallel
from dispec.engine.distributed.tensor_parallel import TensorParallelError
from dispec.engine.execution.ranks import ComputeLogits
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import SamplingParams
from dispec.layers.config import ModelConfig, Shard
from dispec.layers.sharding import Sharding
from dispec.layers.types import unstack_layers
from dispec.layers.weight_specs import declare
from dispec.layers.weights import load_weights
from tests.checkpoints import save_tiny

FLOAT32 = {"dtype": "float32", "device": "cpu", "kv_cache_memory": "4MiB", "max_num_seqs": 8, "enforce_eager": True}
PROMPTS = ["The quick brown fox", "What is the capital of France?", "The quick brown fox jumps over", "def add(a, b):"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, logprobs=3, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=5, n=3, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=24, prompt_logprobs=2, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=7, top_p=0.9, frequency_penalty=0.5, max_tokens=24, ignore_eos=True),
]


def config(heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=intermediate,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        qkv_bias=True,
        output_bias=True,
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Nine heads in three groups with a vocabulary that three ranks do not divide; fourteen in two, which three ranks
    must share."""
    found = {family: tmp_path_factory.mktemp(family) for family in ("llama", "qwen2")}
    for family, path in found.items():
        save_tiny(path, family, **({"attention_bias": True} if family == "llama" else {}))
    return found


@pytest.fixture(params=["llama", "qwen2"])
def directory(request, checkpoints) -> Path:
    return checkpoints[request.param]


@pytest.fixture
def llama(checkpoints) -> Path:
    """A checkpoint for tests in which the shapes of the parts make no difference."""
    return checkpoints["llama"]


@pytest.fixture(scope="module")
def alone(checkpoints) -> dict[Path, list]:
    """Return the answers of one rank by checkpoint."""
    return {path: answers(path) for path in checkpoints.values()}


def answers(directory, **options) -> list:
    llm = LLM(directory, **FLOAT32 | options)
    try:
        # The second time the prompts are in the prefix cache.
        return [one for _ in range(2) for one in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
    finally:
        llm.engine.close()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "intermediate", "vocabulary"),
    [(9, 3, 192, 500), (14, 2, 130, 512), (8, 8, 96, 33), (6, 1, 256, 1000)],
)
@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_the_parts_are_the_whole(heads, kv_heads, intermediate, vocabulary, size):
    whole = config(heads, kv_heads, intermediate, vocabulary)
    ranks = [Sharding(whole, Shard(rank, size, "g")) for rank in range(size)]
    for axis, count in (("query_heads", heads), ("intermediate", intermediate), ("vocabulary", vocabulary)):
        parts = [rank.part(axis, count) for rank in ranks]
        assert [number for part in parts for number in range(part.start, part.stop)] == list(range(count))
        assert all(part.stop - part.start <= part.size for part in parts)
    group = heads // kv_heads
    for rank in ranks:
        query, kv, local = rank.part("query_heads", heads), rank.part("kv_heads", kv_heads), rank.local_config()
        # The model takes query head q to attend to key/value head q // (heads / kv_heads), of its own.
        for own in range(local.num_heads):
            theirs = (query.start + own) // group
            assert kv.start + own // (local.num_heads // local.num_kv_heads) == theirs


def test_ranks_load_their_parts_of_every_weight(directory):
    checkpoint = find_checkpoint(directory)
    whole = dict(checkpoint.tensors())
    size = 3
    shards = [Shard(rank, size, "g") for rank in range(size)]
    loaded = [
        load_weights(checkpoint.config, checkpoint.tensors(), torch.float32, torch.device("cpu"), shard=shard)
        for shard in shards
    ]
    for layer, ranks in enumerate(zip(*(unstack_layers(rank.layers) for rank in loaded), strict=True)):
        prefix = f"model.layers.{layer}"
        down = torch.cat([rank.mlp.down for rank in ranks], dim=1)
        assert torch.equal(down, whole[f"{prefix}.mlp.down_proj.weight"])
        output = torch.cat([rank.attention.output for rank in ranks], dim=1)
        assert torch.equal(output, whole[f"{prefix}.self_attn.o_proj.weight"])
        gates = torch.cat([rank.mlp.gate_up.chunk(2)[0] for rank in ranks])
        assert torch.equal(gates, whole[f"{prefix}.mlp.gate_proj.weight"])
        if (bias := whole.get(f"{prefix}.self_attn.o_proj.bias")) is not None:
            assert torch.equal(sum(rank.attention.output_bias for rank in ranks), bias)
    rows = torch.cat([rank.embedding for rank in loaded])
    assert torch.equal(rows[: checkpoint.config.vocab_size], whole["model.embed_tokens.weight"])
    assert not rows[checkpoint.config.vocab_size :].any()


def test_no_rank_has_much_more_than_its_share():
    whole = config(9, 3, 1536, 49152)
    elements = sum(math.prod(spec.shape) for spec in declare(whole) if spec.kind != "vector")
    for rank in range(3):
        sharding = Sharding(whole, Shard(rank, 3, "g"))
        own = sum(math.prod(spec.local_shape(sharding)) for spec in declare(whole) if spec.kind != "vector")
        assert own == pytest.approx(elements / 3, rel=0.01)


def logprobs_of(entry: TokenLogprobs | None) -> dict[int, float]:
    assert entry is not None
    return {token: one.logprob for token, one in entry.items()}


@pytest.mark.parametrize("size", [2, 3])
def test_answers_are_those_of_one_rank(directory, alone, size):
    together = answers(directory, tensor_parallel_size=size)
    for one, several in zip(alone[directory], together, strict=True):
        for choice, other in zip(one.outputs, several.outputs, strict=True):
            assert other.token_ids == choice.token_ids
            for expected, found in zip(choice.logprobs or [], other.logprobs or [], strict=True):
                assert logprobs_of(found) == pytest.approx(logprobs_of(expected), abs=1e-4)
        assert (several.prompt_logprobs is None) == (one.prompt_logprobs is None)
        for expected, found in zip((one.prompt_logprobs or [])[1:], (several.prompt_logprobs or [])[1:], strict=True):
            assert logprobs_of(found) == pytest.approx(logprobs_of(expected), abs=1e-4)


@pytest.mark.parametrize(("family", "is_target"), [("qwen2", True), ("llama", False)])
def test_the_first_rank_alone_runs_a_draft_model(checkpoints, alone, tmp_path, family, is_target):
    """The target itself, whose draft tokens are accepted, and a model of other weights."""
    directory = draft = checkpoints[family]
    if not is_target:
        save_tiny(tmp_path, "llama", seed=1)
        draft = tmp_path
    llm = LLM(directory, **FLOAT32, tensor_parallel_size=2, speculative_model=draft)
    try:
        llm.engine.speculator.is_adaptive = False
        together = [one for _ in range(2) for one in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
        records = [record for record in llm.engine.records if record.num_drafts]
    finally:
        llm.engine.close()
    expected = alone[directory]
    assert [c.token_ids for one in together for c in one.outputs] == [
        c.token_ids for one in expected for c in one.outputs
    ]
    num_draft_tokens = sum(record.num_draft_tokens for record in records)
    num_accepted = sum(sum(record.num_accepted_per_position) for record in records)
    assert num_draft_tokens > 50
    assert num_accepted > 0.9 * num_draft_tokens if is_target else num_accepted < 0.2 * num_draft_tokens


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen2", {}), ("llama", {"speculative_model": "ngram"}), ("qwen2", {"async_scheduling": True})],
)
def test_draft_tokens_small_steps_and_overlap_change_nothing(checkpoints, alone, family, options):
    together = answers(checkpoints[family], tensor_parallel_size=2, max_num_batched_tokens=8, **options)
    expected = alone[checkpoints[family]]
    assert [c.token_ids for one in together for c in one.outputs] == [
        c.token_ids for one in expected for c in one.outputs
    ]


def test_other_ranks_read_a_token_that_only_the_first_has_sampled(llama, alone):
    """The host does not know it when the step is launched: what the first rank sampled is broadcast on the device."""
    expected = alone[llama][0].outputs[0].token_ids
    llm = LLM(llama, **FLOAT32, tensor_parallel_size=2, async_scheduling=True)
    try:
        engine = llm.engine
        sequence = engine.add(llm.tokenizer.encode(PROMPTS[0]), PARAMS[0])
        overlapping = 0
        while engine.has_work:
            engine.step()
            overlapping += len(engine._launched)
        assert overlapping == PARAMS[0].max_tokens
        assert sequence.output_token_ids == expected
    finally:
        llm.engine.close()


def test_dummy_weights_are_parts_of_the_same():
    whole = config(9, 3, 192, 500)
    prompt, params = [[1, 2, 3, 4]], [SamplingParams(temperature=0, max_tokens=8)]
    found = []
    for size in (1, 2):
        llm = LLM(whole, **FLOAT32, load_format="dummy", tensor_parallel_size=size)
        found.append(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids)
        llm.engine.close()
    assert found[0] == found[1]


def test_a_rank_that_dies_is_named(llama):
    llm = LLM(llama, **FLOAT32, tensor_parallel_size=2)
    follower = llm.engine._ranks._followers[0]
    try:
        llm.generate("one", SamplingParams(max_tokens=2), use_tqdm=False)
        os.kill(follower.pid, signal.SIGKILL)
        with pytest.raises(TensorParallelError, match="rank 1 ended with status -9"):
            llm.generate("two", SamplingParams(max_tokens=2), use_tqdm=False)
    finally:
        llm.engine.close()
    assert not dist.is_initialized()


def test_a_rank_that_does_not_start_is_named(llama, monkeypatch):
    monkeypatch.setattr(tensor_parallel, "_WORKER", "tests.no_such_module")
    with pytest.raises(TensorParallelError, match="rank 1 ended with status 1, rank 2 ended with status 1"):
        LLM(llama, **FLOAT32, tensor_parallel_size=3)
    assert not dist.is_initialized()


def test_a_compiler_that_fails_amid_a_step_of_all_ranks_ends_them(llama, monkeypatch):
    """The others wait in a sum to which the first does not come: answering eagerly is no way out."""
    llm = LLM(llama, **FLOAT32, tensor_parallel_size=2)
    runner = llm.engine.runner

    def fail(*_):
        with llm.engine._ranks.together(ComputeLogits(bytes(4 * llm.engine.config.hidden_size))):
            raise RuntimeError("no compiler here")

    try:
        monkeypatch.setattr(runner, "_compile_pieces", fail)
        with pytest.raises(TensorParallelError, match="no compiler here"):
            list(runner.compile_pieces())
    finally:
        llm.engine.close()


def test_a_rank_that_dies_while_nothing_is_to_be_done_wakes_the_engine(llama):
    llm = LLM(llama, **FLOAT32, tensor_parallel_size=3)
    try:
        os.kill(llm.engine._ranks._followers[1].pid, signal.SIGKILL)
        readable, _, _ = select.select(llm.engine.wake_ups, [], [], 60)
        assert len(readable) == 1
        with pytest.raises(TensorParallelError, match=r"whole: rank 2 ended with status -9$"):
            llm.engine.work_while_idle()
    finally:
        llm.engine.close()


def test_what_is_refused_late_leaves_no_ranks(llama):
    with pytest.raises(ValueError, match="max_model_len is 100000"):
        LLM(llama, **FLOAT32, tensor_parallel_size=2, max_model_len=100_000)
    assert not dist.is_initialized()
    answers(llama, tensor_parallel_size=2)


def test_an_engine_that_is_forgotten_leaves_no_ranks(llama):
    before = set(psutil.Process().children(recursive=True))
    llm = LLM(llama, **FLOAT32, tensor_parallel_size=2)
    assert len(set(psutil.Process().children(recursive=True)) - before) == 1
    del llm
    gc.collect()
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not dist.is_initialized()


def test_one_engine_with_ranks_at_a_time(llama):
    llm = LLM(llama, **FLOAT32, tensor_parallel_size=2)
    try:
        with pytest.raises(ValueError, match="tensor_parallel_size is 2, but this process has"):
            LLM(llama, **FLOAT32, tensor_parallel_size=2)
    finally:
        llm.engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_transfer": "tcp"}, "kv_transfer is 'tcp'"),
        ({"tensor_parallel_size": 65}, "between 1 and 64"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EngineOptions(**{"tensor_parallel_size": 2} | options)


def test_more_ranks_than_heads_are_refused_before_anything_starts(llama):
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 20: the model has . key/value heads"):
        LLM(llama, **FLOAT32, tensor_parallel_size=20)
    assert not dist.is_initialized()
