"""The engine on a CUDA device answers as transformers does, and compiled as eagerly."""

import select
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dispec import SamplingParams
from dispec.engine.engine import Engine
from dispec.engine.scheduling.sequence import Status
from dispec.layers.config import UnsupportedModelError
from dispec.ops import Kind, has_quantized_kernel
from tests.checkpoints import FAMILIES, VOCAB_SIZE, save_tiny
from tests.gpu_engine import (
    CONFIG,
    NEEDS_CUDA,
    SMALL,
    expect_close_logprobs,
    expect_replayed,
    greedy,
    make,
    prompts,
    token_ids,
    unchecked,
)
from tests.grammar_cases import check_text, grammar_params, text_of
from tests.small_engine import mixed_params, prompt_logprobs

__all__ = ["unchecked"]
pytestmark = NEEDS_CUDA


def expected_tokens(reference: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    with torch.no_grad():
        ids = torch.tensor([prompt], device="cuda")
        return reference.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None)[
            0, len(prompt) :
        ].tolist()


@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_float32_equal_transformers(family: str, enforce_eager: bool, tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, family, head_dim=64).eval().to("cuda")
    given = prompts(9, vocab_size=VOCAB_SIZE)
    with make(tmp_path, dtype="float32", enforce_eager=enforce_eager) as llm:
        assert llm.engine.runner.is_compiled != enforce_eager
        found = token_ids(llm.generate(given, greedy()))
    assert found == [expected_tokens(reference, prompt, 16) for prompt in given]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_most_tokens_in_half_precision_equal_transformers(dtype: str, tmp_path: Path) -> None:
    """One step of teacher forcing per token: ties of half precision must not cascade."""
    reference = save_tiny(tmp_path, "llama", head_dim=64).eval().to("cuda", getattr(torch, dtype))
    given = prompts(64, longest=60, vocab_size=VOCAB_SIZE)
    with make(tmp_path, dtype=dtype) as llm:
        found = token_ids(llm.generate(given, greedy(1)))
    agreed = sum(tokens == expected_tokens(reference, prompt, 1) for tokens, prompt in zip(found, given, strict=True))
    print(f"{dtype}: {agreed} of 64 next tokens agree with transformers")
    assert agreed >= 60


@pytest.mark.parametrize("speculative_model", [None, "ngram", "itself"])
def test_grammars_in_compiled_steps_equal_those_in_eager_ones(speculative_model: str | None, tmp_path: Path) -> None:
    """Beside free text, with every kind of sampling; outputs that end by themselves and that are closed."""
    save_tiny(tmp_path, "llama", head_dim=64)
    draft = tmp_path if speculative_model == "itself" else speculative_model
    given = prompts(18, vocab_size=VOCAB_SIZE)
    params = [*grammar_params(16, max_tokens=42, min_tokens=0), *mixed_params(2)]
    with make(tmp_path, dtype="float32", enforce_eager=True) as eager:
        expected = token_ids(eager.generate(given, params))
        for index, tokens in enumerate(expected[:16]):
            check_text(index, text_of(eager, tokens))
    with make(tmp_path, dtype="float32", speculative_model=draft) as compiled:
        assert token_ids(compiled.generate(given, params)) == expected
        expect_replayed()


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_compiled_equals_eager_and_batched_equals_alone_in_float32(async_scheduling: bool) -> None:
    """With every sampling feature; a step queued ahead, or not."""
    given, params = prompts(16), mixed_params(16)
    with make(dtype="float32", enforce_eager=True) as eager:
        expected = token_ids(eager.generate(given, params))
    with make(dtype="float32", async_scheduling=async_scheduling) as compiled:
        assert compiled.engine.runner.is_compiled
        assert compiled.engine.plan.overlaps == async_scheduling
        assert token_ids(compiled.generate(given, params)) == expected
        pairs = zip(given, params, strict=True)
        assert [compiled.generate([prompt], param)[0].outputs[0].token_ids for prompt, param in pairs] == expected
        expect_replayed()


@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compiled_is_close_to_eager_in_half_precision(dtype: str, head_norms: bool) -> None:
    """Dummy weights with Qwen2's or Qwen3's flags."""
    config = replace(CONFIG, qkv_bias=not head_norms, qk_norm=head_norms)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
    with make(config, dtype=dtype, enforce_eager=True) as eager:
        expected = eager.generate(prompts(6), params)
    with make(config, dtype=dtype) as compiled:
        assert compiled.engine.runner.is_compiled
        expect_close_logprobs(compiled.generate(prompts(6), params), expected)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("quantization", ["int4", "int8", "fp8"])
def test_quantized_weights(quantization: Kind, tie_embeddings: bool) -> None:
    if not has_quantized_kernel(quantization, torch.device("cuda"), torch.bfloat16):
        pytest.skip(f"has no kernel for {quantization}")
    config = replace(CONFIG, tie_embeddings=tie_embeddings)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
    options = {"dtype": "bfloat16", "quantization": quantization}
    with make(config, enforce_eager=True, **options) as eager:
        expected = eager.generate(prompts(6), params)
    with make(config, **options) as compiled:
        assert compiled.engine.runner.is_compiled
        found = compiled.generate(prompts(6), params)
        expect_replayed()
    # Steps of other sizes run other kernels; a row in fp8 may round to the neighbouring codes then.
    expect_close_logprobs(found, expected, 0.15 if quantization == "fp8" else 0.06)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_quantized_cache_equals_that_of_a_cpu(kv_cache_dtype: str, tmp_path: Path) -> None:
    """In float32, where codes differ only at ties."""
    save_tiny(tmp_path, "qwen3", head_dim=64)
    given = prompts(9, vocab_size=VOCAB_SIZE)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=3)
    options = {"dtype": "float32", "kv_cache_dtype": kv_cache_dtype}
    with make(tmp_path, device="cpu", enforce_eager=True, **options) as cpu:
        expected = cpu.generate(given, params)
    with make(tmp_path, **options) as llm:
        assert llm.engine.runner.is_compiled
        found = llm.generate(given, params)
        expect_replayed()
    expect_close_logprobs(found, expected, 0.02)
    equal = sum(ours == theirs for ours, theirs in zip(token_ids(found), token_ids(expected), strict=True))
    assert equal >= len(given) - 2


@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_quantized_cache_in_bfloat16(kv_cache_dtype: str, head_norms: bool) -> None:
    """Compiled is close to eager, and to a cache that is not quantised."""
    config = replace(CONFIG, qkv_bias=not head_norms, qk_norm=head_norms)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
    with make(config, enforce_eager=True) as plain:
        precise = plain.generate(prompts(6), params)
    with make(config, enforce_eager=True, kv_cache_dtype=kv_cache_dtype) as eager:
        expected = eager.generate(prompts(6), params)
    with make(config, kv_cache_dtype=kv_cache_dtype) as compiled:
        assert compiled.engine.runner.is_compiled
        found = compiled.generate(prompts(6), params)
        expect_replayed()
    expect_close_logprobs(found, expected)
    expect_close_logprobs(found, precise, 0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_padding_of_a_prefill_step_changes_nothing(dtype: str) -> None:
    """Prompts beside the sizes that graphs are recorded for, at them, and over the budget of a step."""
    given = [[(7 * token + length) % 1024 for token in range(length)] for length in (1, 31, 32, 33, 127, 200, 256, 300)]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=1)
    with make(dtype=dtype, enforce_eager=True) as eager:
        expected = [eager.generate([prompt], params)[0] for prompt in given]
    with make(dtype=dtype) as compiled:
        found = [compiled.generate([prompt], params)[0] for prompt in given]
    tolerance = 1e-3 if dtype == "float32" else 0.06
    for ours, theirs in zip(found, expected, strict=True):
        assert dtype != "float32" or ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        for one, other in zip(prompt_logprobs(ours), prompt_logprobs(theirs), strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=tolerance)


def test_a_step_of_as_many_prompts_as_there_may_be_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sequence is left for the padding, which is longer than a block table."""

    def fail(_: Engine, error: Exception) -> None:
        raise error

    monkeypatch.setattr(Engine, "_isolate_failure", fail)
    options = {"dtype": "float32", "max_num_batched_tokens": 2048, "max_model_len": 96}
    given = [[(7 * token + index) % 1024 for token in range(70)] for index in range(SMALL["max_num_seqs"])]
    found = []
    for enforce_eager in (False, True):
        with make(enforce_eager=enforce_eager, **options) as llm:
            found.append(token_ids(llm.generate(given, greedy(5))))
    assert found[0] == found[1]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_answers_that_one_engine_begins_another_ends(kv_cache_dtype: str) -> None:
    """Keys and values move between the caches of two engines on one device."""
    given, params = prompts(8, longest=200), mixed_params(8, max_tokens=12)
    options = {"dtype": "float32", "kv_transfer": "tcp", "kv_cache_dtype": kv_cache_dtype}
    with make(enforce_eager=True, **options) as first, make(**options) as second:
        expected = token_ids(first.generate(given, params))
        engines = (first.engine, second.engine)
        transfers = first.engine.kv_connector.transfer_engine
        assert transfers is not None
        begun, ended = [], []
        for index, (prompt, param) in enumerate(zip(given, params, strict=True)):
            begun.append(first.engine.add(prompt, param, publish_as=str(index)))
            ended.append(second.engine.add(prompt, param, pull=transfers.remote_blocks(str(index))))
        run_until(engines, lambda: all(sequence.status is Status.FINISHED for sequence in ended))
        assert [sequence.output_token_ids for sequence in ended] == expected
        assert sum(record.num_received_prompts for record in second.engine.records) == len(given)


def run_until(engines: tuple[Engine, ...], is_done: Callable[[], bool], patience: float = 60.0) -> None:
    """Step engines in turn; while none has work, wait for what the others send."""
    end = time.monotonic() + patience
    while not is_done():
        assert time.monotonic() < end, "the requests never ended"
        for engine in engines:
            engine.work_while_idle()
            if engine.has_work:
                engine.step()
        if not any(engine.has_work for engine in engines):
            select.select([descriptor for engine in engines for descriptor in engine.wake_ups], [], [], 0.1)


def test_e4m3_is_refused_where_triton_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8\.9, the device has 8\.0: use 'int8'"):
        make(kv_cache_dtype="fp8")


def test_a_head_dim_without_kernels_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="head_dim 32 on CUDA"):
        make(replace(CONFIG, head_dim=32))
