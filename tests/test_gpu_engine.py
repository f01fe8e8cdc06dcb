"""The engine on a CUDA device: against transformers, and replaying CUDA graphs without a copy too many."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch._dynamo.utils import counters

import ops
from engine import LLM, SamplingParams
from engine.engine import Engine
from engine.step_inputs import batch_buckets
from layers.config import ModelConfig, UnsupportedModelError
from tests.checkpoints import FAMILIES, VOCAB_SIZE, save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SMALL = {"device": "cuda", "kv_cache_memory": "256MiB", "max_num_seqs": 16, "max_num_batched_tokens": 256}
# Head dims that the kernels are tuned for: the tiny checkpoints' are smaller than any real model's.
CONFIG = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    qkv_bias=True,
)


@pytest.fixture(autouse=True, scope="module")
def unchecked() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def prompts(count: int, longest: int = 90, vocab: int = VOCAB_SIZE) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy(max_tokens: int = 16) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def profiled(engine: Engine, num_steps: int) -> tuple[Any, int]:
    """What the profiler says of so many steps: averages, and how many graphs were launched."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(num_steps):
            engine.step()
        torch.cuda.synchronize()
    averages = profile.key_averages()
    return averages, sum(event.count for event in averages if event.key == "cudaGraphLaunch")


def expected_tokens(reference: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    with torch.no_grad():
        ids = torch.tensor([prompt], device="cuda")
        return reference.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None)[
            0, len(prompt) :
        ].tolist()


@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_float32_equal_transformers(family: str, enforce_eager: bool, tmp_path: Path) -> None:
    torch._dynamo.reset()
    reference = save_tiny(tmp_path, family, head_dim=64).eval().to("cuda")
    llm = LLM(tmp_path, dtype="float32", enforce_eager=enforce_eager, **SMALL)
    assert llm.engine.runner.is_compiled != enforce_eager
    for completion, prompt in zip(llm.generate(prompts(9), greedy()), prompts(9), strict=True):
        assert completion.token_ids == expected_tokens(reference, prompt, 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_most_tokens_in_half_precision_equal_transformers(dtype: str, tmp_path: Path) -> None:
    """One step of teacher forcing per token: ties of half precision must not cascade."""
    torch._dynamo.reset()
    reference = save_tiny(tmp_path, "llama", head_dim=64).eval().to("cuda", getattr(torch, dtype))
    llm = LLM(tmp_path, dtype=dtype, **SMALL)
    sequences = prompts(64, longest=60)
    agreed = 0
    for completion, prompt in zip(llm.generate(sequences, greedy(1)), sequences, strict=True):
        agreed += completion.token_ids == expected_tokens(reference, prompt, 1)
    print(f"{dtype}: {agreed} of 64 next tokens agree with transformers")
    assert agreed >= 60


def test_a_decode_step_replays_one_graph_and_copies_only_its_inputs() -> None:
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch({"triton.cudagraph_or_error": True}):
        llm = LLM(CONFIG, load_format="dummy", dtype="bfloat16", **SMALL)
    engine = llm.engine
    assert engine.runner.is_compiled
    graphs = counters["stats"]["unique_graphs"]
    for prompt in prompts(5, vocab=1024):
        engine.add(prompt, greedy(40))
    for _ in range(8):
        engine.step()
    averages, launches = profiled(engine, 10)
    assert all(record.kind == "decode" for record in list(engine.records)[-10:])
    assert launches == 10
    assert counters["inductor"]["cudagraph_skips"] == 0
    # The fields of a step and its symbolic sizes, in the graph of each bucket: were the weights or the cache among
    # them, there would be 30 more.
    buckets = len(batch_buckets(SMALL["max_num_seqs"]))
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] <= 24 * buckets
    assert counters["stats"]["unique_graphs"] == graphs
    keys = engine.runner.kv_cache.layers()[0].keys
    largest_copy = max((event.device_memory_usage for event in averages if "copy" in event.key), default=0)
    assert largest_copy < keys.numel() * keys.element_size()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_threads_replay_the_same_graphs(dtype: str) -> None:
    """The current device belongs to a thread, and graphs were recorded in another one."""
    torch._dynamo.reset()
    counters.clear()
    llm = LLM(CONFIG, load_format="dummy", dtype=dtype, **SMALL)
    given = prompts(6, vocab=1024)
    params = [SamplingParams(temperature=index % 2, seed=index, max_tokens=20, ignore_eos=True) for index in range(6)]

    def answer(index: int) -> list[int]:
        return llm.generate([given[index]], params[index])[0].token_ids

    expected = [answer(index) for index in range(6)]
    graphs = counters["stats"]["unique_graphs"]
    with ThreadPoolExecutor(1) as another:
        assert list(another.map(answer, range(6))) == expected
    assert counters["stats"]["unique_graphs"] == graphs
    with ThreadPoolExecutor(4) as several:  # batches of every size, whose sums bfloat16 may round differently
        found = list(several.map(answer, [*range(6)] * 4))
    assert [len(tokens) for tokens in found] == [20] * 24
    assert dtype == "bfloat16" or found == expected * 4
    assert not llm.engine.has_work


@pytest.mark.parametrize("head_norms", [False, True])
def test_layers_as_one_op_say_what_their_parts_say(head_norms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dummy weights with Qwen2's or Qwen3's flags, in bfloat16: logprobs with the op and without."""
    torch._dynamo.reset()
    config = replace(CONFIG, qkv_bias=not head_norms, qk_norm=head_norms)
    batch = prompts(6, vocab=1024)
    calls = []

    def answers(enforce_eager: bool) -> list:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
        llm = LLM(config, load_format="dummy", dtype="bfloat16", enforce_eager=enforce_eager, **SMALL)
        return llm.generate(batch, params)

    compiled = answers(enforce_eager=False)
    layer = ops.decoder_layer
    monkeypatch.setattr(ops, "decoder_layer", lambda *given: calls.append(1) or layer(*given))
    whole = answers(enforce_eager=True)
    assert calls
    monkeypatch.setattr(ops, "has_layer_kernel", lambda *_: False)
    parts = answers(enforce_eager=True)
    for found in (compiled, whole):
        for ours, theirs in zip(found, parts, strict=True):
            for index, (one, other) in enumerate(zip(ours.logprobs, theirs.logprobs, strict=True)):
                if ours.token_ids[:index] != theirs.token_ids[:index]:
                    break  # a tie was decided otherwise, and from here on they answer different texts
                assert one.logprob == pytest.approx(other.logprob, abs=0.06)


def test_steps_replay_graphs_before_anything_is_compiled_and_answer_the_same_after() -> None:
    torch._dynamo.reset()
    llm = LLM(CONFIG, load_format="dummy", dtype="bfloat16", compile="background", **SMALL)
    engine, batch = llm.engine, prompts(6, vocab=1024)
    params = [
        SamplingParams(temperature=temperature, seed=7, max_tokens=6, ignore_eos=True, logprobs=3)
        for temperature in (0, 0.8, 0, 0.8, 0, 0.8)
    ]
    first = llm.generate(batch[:1], greedy(2))
    engine.add(batch[0], greedy(40))
    for _ in range(4):
        engine.step()
    _, launches = profiled(engine, 10)
    assert launches == 10
    assert not engine.runner.is_compiled
    while engine.has_work:
        engine.step()
    before = llm.generate(batch, params)
    while engine.has_idle_work:
        engine.work_while_idle()
    assert engine.runner.is_compiled
    graphs = counters["stats"]["unique_graphs"]
    assert llm.generate(batch[:1], greedy(2))[0].token_ids == first[0].token_ids
    for ours, theirs in zip(llm.generate(batch, params), before, strict=True):
        for index, (one, other) in enumerate(zip(ours.logprobs, theirs.logprobs, strict=True)):
            if ours.token_ids[:index] != theirs.token_ids[:index]:
                break
            assert one.logprob == pytest.approx(other.logprob, abs=0.06)
    engine.add(batch[0], greedy(40))
    for _ in range(4):
        engine.step()
    assert profiled(engine, 10)[1] == 10
    assert counters["stats"]["unique_graphs"] == graphs


def test_many_batch_sizes_without_a_recompilation() -> None:
    torch._dynamo.reset()
    counters.clear()
    llm = LLM(CONFIG, load_format="dummy", dtype="bfloat16", **SMALL)
    graphs = counters["stats"]["unique_graphs"]
    for count in (1, 2, 3, 5, 8, 13, 16, 20):
        params = [
            SamplingParams(temperature=0.7 * (index % 2), max_tokens=1 + index % 7, ignore_eos=True, seed=index)
            for index in range(count)
        ]
        llm.generate(prompts(count, vocab=1024), params)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_compiled_equals_eager_and_batched_equals_alone_in_float32() -> None:
    torch._dynamo.reset()
    params = [SamplingParams(temperature=0.8 * (i % 2), max_tokens=20, ignore_eos=True, seed=i) for i in range(9)]
    batch = prompts(9, vocab=1024)
    compiled = LLM(CONFIG, load_format="dummy", dtype="float32", **SMALL)
    eager = LLM(CONFIG, load_format="dummy", dtype="float32", enforce_eager=True, **SMALL)
    together = [completion.token_ids for completion in compiled.generate(batch, params)]
    assert together == [completion.token_ids for completion in eager.generate(batch, params)]
    assert together == [
        compiled.generate([prompt], param)[0].token_ids for prompt, param in zip(batch, params, strict=True)
    ]


def test_a_short_prompt_is_one_graph_whose_padding_changes_nothing() -> None:
    torch._dynamo.reset()
    compiled = LLM(CONFIG, load_format="dummy", dtype="float32", **SMALL)
    eager = LLM(CONFIG, load_format="dummy", dtype="float32", enforce_eager=True, **SMALL)
    for length in (1, 31, 32, 33, 127, 200, 256, 300):  # beside sizes, at them, and over the budget of a step
        prompt = [(7 * token + length) % 1024 for token in range(length)]
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=1)
        found, expected = (llm.generate([prompt], params)[0] for llm in (compiled, eager))
        assert found.token_ids == expected.token_ids
        pairs = zip(found.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True)
        assert all(ours.logprob == pytest.approx(theirs.logprob, abs=1e-3) for ours, theirs in pairs)
    engine = compiled.engine
    for prompt in prompts(3, vocab=1024):
        engine.add(prompt, greedy(4))
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        engine.step()
        torch.cuda.synchronize()
    launches = {event.key: event.count for event in profile.key_averages() if "aunch" in event.key}
    assert launches.get("cudaGraphLaunch") == 1, launches


def test_a_step_of_as_many_prompts_as_there_may_be_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sequence is left for the padding, which is longer than a block table."""

    def fail(_: Engine, error: Exception) -> None:
        raise error

    monkeypatch.setattr(Engine, "_isolate", fail)
    torch._dynamo.reset()
    options = SMALL | {"max_num_batched_tokens": 2048, "max_model_len": 96}
    batch = [[(7 * token + index) % 1024 for token in range(70)] for index in range(SMALL["max_num_seqs"])]
    found, expected = (
        LLM(CONFIG, load_format="dummy", dtype="float32", enforce_eager=enforce_eager, **options).generate(
            batch, greedy(5)
        )
        for enforce_eager in (False, True)
    )
    assert [completion.token_ids for completion in found] == [completion.token_ids for completion in expected]


def test_a_head_dim_without_kernels_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="head_dim 32 on CUDA"):
        LLM(replace(CONFIG, head_dim=32), load_format="dummy", **SMALL)


def test_memory_is_taken_from_what_is_free() -> None:
    options = SMALL | {"kv_cache_memory": None, "gpu_memory_utilization": 0.5, "enforce_eager": True}
    engine = LLM(CONFIG, load_format="dummy", **options).engine
    free, total = torch.cuda.mem_get_info()
    assert 0.4 < 1 - free / total < 0.6
    assert engine.kv_plan.num_blocks * engine.kv_plan.block_bytes > 0.3 * total


@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("drafter", ["itself", "other"])
def test_with_a_draft_model_tokens_are_those_without(drafter: str, enforce_eager: bool, tmp_path: Path) -> None:
    """Guesses are read where the draft's loop left them: the host could not mend a wrong row or a stale one."""
    torch._dynamo.reset()
    save_tiny(tmp_path / "target", "qwen3", head_dim=64)
    save_tiny(tmp_path / "other", "qwen3", head_dim=64, num_hidden_layers=1, seed=7)
    draft = tmp_path / ("target" if drafter == "itself" else "other")
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"temperature": 1.0, "top_k": 7, "top_p": 0.8},
        {"temperature": 0.0, "frequency_penalty": 0.5},  # guessed for step by step
    ]
    params = [
        SamplingParams(max_tokens=12 + index, ignore_eos=True, seed=index, **kinds[index % 4]) for index in range(11)
    ]
    plain = LLM(tmp_path / "target", dtype="float32", enforce_eager=True, **SMALL)
    expected = [completion.token_ids for completion in plain.generate(prompts(11), params)]
    llm = LLM(tmp_path / "target", dtype="float32", enforce_eager=enforce_eager, speculative_model=draft, **SMALL)
    assert llm.engine.speculator is not None
    llm.engine.speculator.is_adaptive = False
    assert [completion.token_ids for completion in llm.generate(prompts(11), params)] == expected
    if drafter == "itself":  # rounding may differ between the draft's kernels and those that verify
        stood = sum(sum(record.num_stood) for record in llm.engine.records)
        assert stood > 0.9 * sum(record.num_draft_tokens for record in llm.engine.records)


def test_guesses_of_a_draft_model_are_one_graph() -> None:
    torch._dynamo.reset()
    llm = LLM(
        CONFIG,
        load_format="dummy",
        dtype="bfloat16",
        speculative_model=replace(CONFIG, num_layers=1),
        num_speculative_tokens=3,
        **SMALL,
    )
    engine = llm.engine
    assert engine.speculator is not None
    engine.speculator.is_adaptive = False
    for prompt in prompts(5, vocab=1024):
        engine.add(prompt, greedy(60))
    for _ in range(6):
        engine.step()
    _, launches = profiled(engine, 5)
    assert all(record.num_drafts == 5 for record in list(engine.records)[-5:])
    # One for the guesses, one that verifies them.
    assert launches == 10
