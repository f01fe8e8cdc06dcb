"""Memory of engines on a CUDA device: the cache is never copied, and all of it is given back."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.gpu_engine import CONFIG, NEEDS_CUDA, greedy, make, prompts, unchecked
from tests.small_engine import mixed_params

__all__ = ["unchecked"]
pytestmark = NEEDS_CUDA

KV_BYTES = 2 * 2**30  # weights and activations of these engines are under 100 MiB


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("bfloat16", {}),
        ("bfloat16", {"kv_cache_dtype": "int8"}),
        ("bfloat16", {"kv_cache_dtype": "fp8"}),
        ("float32", {}),
        ("bfloat16", {"speculative_model": "ngram"}),
        ("bfloat16", {"speculative_model": replace(CONFIG, num_layers=1)}),
    ],
    ids=["bfloat16", "int8", "fp8", "float32", "n-grams", "draft model"],
)
def test_no_step_copies_a_layers_cache(dtype: str, options: dict[str, Any]) -> None:
    """A cache that a graph does not know as static is copied at each replay, into memory taken at the recording."""
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    with make(dtype=dtype, kv_cache_memory=KV_BYTES, **options) as llm:
        llm.generate(prompts(12), mixed_params(12))
        engine = llm.engine
        layer = engine.runner.kv_cache.keys[0]
        limit = before + engine.kv_plan.num_blocks * engine.kv_plan.block_bytes + layer.nbytes
        assert torch.cuda.max_memory_allocated() < limit
        copied = layer.clone()
        assert torch.cuda.max_memory_allocated() >= limit, "a copy of a layer's keys goes unnoticed"
        del copied, layer


@pytest.mark.parametrize(
    "speculation", [{}, {"speculative_model": replace(CONFIG, num_layers=1)}], ids=["plain", "draft model"]
)
def test_a_closed_engine_gives_its_memory_back(speculation: dict[str, Any]) -> None:
    """The second engine needs the memory of the first, whose graphs and compiled functions must not keep it."""
    before = allocated()
    for _ in range(2):
        llm = make(dtype="bfloat16", kv_cache_memory=KV_BYTES, **speculation)
        assert allocated() - before > 0.9 * KV_BYTES
        llm.generate(prompts(3), greedy(4))
        llm.close()
        del llm
        assert allocated() - before < KV_BYTES / 16


def test_memory_is_taken_from_what_is_free() -> None:
    with make(kv_cache_memory=None, gpu_memory_utilization=0.5, enforce_eager=True) as llm:
        free, total = torch.cuda.mem_get_info()
        assert 0.4 < 1 - free / total < 0.6
        plan = llm.engine.kv_plan
        assert plan.num_blocks * plan.block_bytes > 0.3 * total
