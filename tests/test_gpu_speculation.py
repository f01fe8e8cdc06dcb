"""Speculation on a CUDA device: the same tokens, from graphs that are all recorded at the start."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispec import SamplingParams
from dispec.layers.config import ModelConfig
from tests.checkpoints import VOCAB_SIZE, save_tiny
from tests.gpu_engine import (
    CONFIG,
    NEEDS_CUDA,
    count_launches,
    decoding,
    expect_replayed,
    make,
    num_graphs,
    num_sampler_graphs,
    prompts,
    token_ids,
    unchecked,
)
from tests.small_engine import mixed_params

__all__ = ["unchecked"]
pytestmark = NEEDS_CUDA

DRAFT = replace(CONFIG, num_layers=1)
# Prefill, and the draft step: of two tokens of each sequence at first, then of one.
DRAFT_GRAPHS = 2
ALPHABET = (30, 31, 32, 33)


def few_tokens(count: int) -> list[list[int]]:
    """Prompts of so few different tokens that every n-gram recurs."""
    return [[ALPHABET[token % len(ALPHABET)] for token in prompt] for prompt in prompts(count, longest=60)]


def of_few_tokens(params: list[SamplingParams]) -> list[SamplingParams]:
    return [replace(param, allowed_token_ids=ALPHABET) for param in params]


@pytest.mark.parametrize(
    "options", [{}, {"async_scheduling": False}, {"enforce_eager": True}], ids=["overlapping", "waiting", "eager"]
)
@pytest.mark.parametrize("proposer", ["itself", "other"])
def test_with_a_draft_model_tokens_are_those_without(proposer: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Draft tokens are read where the draft steps left them: the host could not mend a wrong row or a stale one."""
    save_tiny(tmp_path / "target", "qwen3", head_dim=64)
    save_tiny(tmp_path / "other", "qwen3", head_dim=64, num_hidden_layers=1, seed=7)
    draft = tmp_path / ("target" if proposer == "itself" else "other")
    given = prompts(11, vocab_size=VOCAB_SIZE)
    params = [replace(param, max_tokens=12 + index) for index, param in enumerate(mixed_params(11))]
    with make(tmp_path / "target", dtype="float32", enforce_eager=True) as plain:
        expected = token_ids(plain.generate(given, params))
    with make(tmp_path / "target", dtype="float32", speculative_model=draft, **options) as llm:
        engine = llm.engine
        assert engine.speculator is not None
        assert options or engine.plan.overlaps
        engine.speculator.is_adaptive = False
        assert token_ids(llm.generate(given, params)) == expected
        accepted = sum(sum(record.num_accepted_per_position) for record in engine.records)
        proposed = sum(record.num_draft_tokens for record in engine.records)
    assert proposed
    # Rounding may differ between the draft's kernels and those that verify.
    assert proposer == "other" or accepted > 0.9 * proposed


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_quantized_cache_with_a_draft_model(kv_cache_dtype: str, tmp_path: Path) -> None:
    """A model that is its own draft model: nearly all draft tokens are accepted, and few sequences differ.

    A code that is rounded at a tie may differ between decoding and verification.
    """
    save_tiny(tmp_path, "qwen3", head_dim=64)
    given = prompts(11, vocab_size=VOCAB_SIZE)
    params = [SamplingParams(temperature=0, max_tokens=12 + index, ignore_eos=True) for index in range(11)]
    options = {"dtype": "float32", "kv_cache_dtype": kv_cache_dtype}
    with make(tmp_path, enforce_eager=True, **options) as plain:
        expected = token_ids(plain.generate(given, params))
    with make(tmp_path, speculative_model=tmp_path, **options) as llm:
        engine = llm.engine
        assert engine.speculator is not None
        engine.speculator.is_adaptive = False
        found = token_ids(llm.generate(given, params))
        accepted = sum(sum(record.num_accepted_per_position) for record in engine.records)
        assert accepted > 0.9 * sum(record.num_draft_tokens for record in engine.records) > 0
        expect_replayed()
    assert sum(ours == theirs for ours, theirs in zip(found, expected, strict=True)) >= len(given) - 2


@pytest.mark.parametrize("proposer", ["ngram", DRAFT], ids=["n-grams", "draft model"])
def test_decoding_and_verification_are_one_graph(proposer: str | ModelConfig) -> None:
    """Over many batch sizes, draft lengths and every sampling feature; the first requests find all graphs recorded."""
    with make(dtype="bfloat16", speculative_model=proposer) as llm:
        speculator = llm.engine.speculator
        assert speculator is not None
        before = num_graphs()
        proposed = 0
        for is_adaptive in (False, True):
            speculator.is_adaptive = is_adaptive
            for count in (1, 2, 3, 8, 16, 20):
                params = [replace(param, max_tokens=1 + index) for index, param in enumerate(mixed_params(count))]
                llm.generate(few_tokens(count), of_few_tokens(params))
                proposed += sum(record.num_draft_tokens for record in llm.engine.records)
        assert proposed
        expected = 2 + num_sampler_graphs(llm.engine) + (DRAFT_GRAPHS if proposer is DRAFT else 0)
        assert num_graphs() == before == expected
        expect_replayed()


def test_n_grams_change_no_token() -> None:
    given, params = few_tokens(12), of_few_tokens(mixed_params(12, max_tokens=40))
    with make(dtype="float32", enforce_eager=True) as plain:
        expected = token_ids(plain.generate(given, params))
    with make(dtype="float32", speculative_model="ngram") as llm:
        assert llm.engine.speculator is not None
        llm.engine.speculator.is_adaptive = False
        assert token_ids(llm.generate(given, params)) == expected
        assert sum(sum(record.num_accepted_per_position) for record in llm.engine.records)


def test_a_step_launches_a_graph_for_each_draft_token_and_one_that_verifies() -> None:
    with make(dtype="bfloat16", speculative_model=DRAFT, num_speculative_tokens=3) as llm:
        engine = llm.engine
        assert engine.speculator is not None
        engine.speculator.is_adaptive = False
        with decoding(engine, 5):
            assert count_launches(engine, 5) == 5 * (3 + 1)
            assert all(record.num_drafts == 5 for record in list(engine.records)[-4:])
