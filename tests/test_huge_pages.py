"""Weights and KV cache on a CPU lie in memory that Linux may back with huge pages."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from dispec import ops
from dispec.engine.execution.kv_cache_memory import KVPlan, allocate_kv_cache
from dispec.layers.config import ModelConfig
from dispec.layers.weight_stacks import Packing
from dispec.layers.weights import dummy_weights
from dispec.ops.cpu.library import has_packed_linear

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not THP.exists(), reason="the system has no transparent huge pages"
)


def may_have_huge_pages(tensor: torch.Tensor) -> bool:
    """Return whether the middle of a tensor is in a mapping with the flag of MADV_HUGEPAGE (Linux: proc.rst)."""
    middle, is_inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            is_inside = begin <= middle < end
        elif is_inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("the tensor is in no mapping")


def mapped(size: int) -> torch.Tensor:
    """Return the numbers from 0 on in a mapping of their own: the heap may have been advised before."""
    memory = mmap.mmap(-1, 4 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.arange(size, dtype=torch.float32, out=torch.frombuffer(memory, dtype=torch.float32))


def test_only_large_tensors_are_advised_and_keep_their_values():
    large, small = mapped(4_000_000), mapped(100_000)
    assert not may_have_huge_pages(large)
    assert ops.on_huge_pages(large) is large
    assert ops.on_huge_pages(small) is small
    assert may_have_huge_pages(large)
    assert not may_have_huge_pages(small)
    assert torch.equal(large, torch.arange(4_000_000, dtype=torch.float32))


def test_a_cache_may_have_huge_pages():
    cache = allocate_kv_cache(CONFIG, KVPlan(512, 16, 2**17, 64, "a test"), torch.bfloat16, torch.device("cpu"))
    assert may_have_huge_pages(cache.keys)
    assert may_have_huge_pages(cache.values)
    assert not cache.keys.any()


@pytest.mark.skipif(not has_packed_linear(), reason="this CPU has neither AVX512-BF16 nor AVX2")
@pytest.mark.parametrize("kind", [None, "int8"])
def test_weights_may_have_huge_pages(kind):
    quantization = kind and ops.Quantization(kind)
    weights = dummy_weights(CONFIG, torch.bfloat16, torch.device("cpu"), packing=Packing(quantization))
    for matrix in (weights.lm_head, weights.layers.mlp.gate_up, weights.layers.attention.qkv):
        assert may_have_huge_pages(matrix.data if kind else matrix.blocked)
