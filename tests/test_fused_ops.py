"""Steps with the ops that CUDA has in 16 bits, compiled on a CPU, where the oracles stand for the kernels."""

import importlib
import re
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from dispec import ops
from dispec.layers.config import ModelConfig
from dispec.layers.model import hidden_states
from dispec.layers.types import Batch, KVCache, Weights
from dispec.layers.weight_stacks import Packing
from dispec.layers.weights import dummy_weights
from dispec.ops import reference
from dispec.ops.kv_cache import codes_and_scales, pages_of_layer, scale_rows

CONFIG = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=500,
    hidden_size=96,
    intermediate_size=160,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=640,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    qkv_bias=True,
)
NUM_BLOCKS, BLOCK_SIZE = 41, 16  # a number that is in no other shape


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """A function whose shapes are checked does not trace."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ops as on CUDA, the oracles as their kernels."""
    for name in ("linear", "rotary"):
        monkeypatch.setattr(importlib.import_module(f"dispec.ops.{name}"), "is_fused", lambda _: True)
    library = torch.library.Library("dispec", "IMPL")
    library.impl("fused_linear", lambda *given: reference.linear(*given).to(given[0].dtype), "CPU")
    library.impl("linear_residual", linear_residual, "CPU")
    library.impl("qkv_rope_write", qkv_rope_write, "CPU")
    torch._dynamo.reset()
    counters.clear()
    yield
    library._destroy()
    torch._dynamo.reset()


def linear_residual(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    total.copy_(total.double() + reference.linear(x, weight, bias, None, 0.0, False))


def qkv_rope_write(*given: Any) -> Tensor:
    *before, keys, values, slots, query_norm, key_norm, layer = given
    pages = pages_of_layer(keys, values, layer)
    if scale_rows(keys.dtype):
        num_blocks, kv_heads, _, block_size = pages[0].shape
        key = torch.zeros(num_blocks, kv_heads, CONFIG.head_dim, block_size)
        value = torch.zeros(num_blocks, kv_heads, block_size, CONFIG.head_dim)
        query = reference.qkv_rope_write(*before, key, value, slots, query_norm, key_norm).to(given[0].dtype)
        block, offset = slots.long() // block_size, slots.long() % block_size
        ops.write_kv(*pages, key.permute(0, 3, 1, 2)[block, offset], value.permute(0, 2, 1, 3)[block, offset], slots)
        return query
    return reference.qkv_rope_write(*before, *pages, slots, query_norm, key_norm).to(given[0].dtype)


def make_cache(num_blocks: int = NUM_BLOCKS, dtype: torch.dtype = torch.bfloat16) -> KVCache:
    """A cache whose number of blocks is symbolic, as that of an engine is: it follows from free memory."""
    torch.manual_seed(0)
    shape = (CONFIG.num_layers, num_blocks, CONFIG.num_kv_heads)
    rows = CONFIG.head_dim + scale_rows(dtype)
    cache = KVCache(
        torch.randn(*shape, rows, BLOCK_SIZE).clamp(-3, 3).to(dtype),
        torch.randn(*shape, BLOCK_SIZE, rows).clamp(-3, 3).to(dtype),
    )
    if scale_rows(dtype):
        for layer in range(CONFIG.num_layers):
            for _, scales in codes_and_scales(*pages_of_layer(*cache, layer)):
                scales.fill_(0.5)
    for pages in cache:
        torch._dynamo.mark_dynamic(pages, 1)
    return cache


def numbers(cache: KVCache) -> list[Tensor]:
    """Return what the codes of a quantised cache stand for, layer by layer, or the cache."""
    if not scale_rows(cache.keys.dtype):
        return list(cache)
    found = []
    for layer in range(CONFIG.num_layers):
        (keys, key_scales), (values, value_scales) = codes_and_scales(*pages_of_layer(*cache, layer))
        found += [keys.float() * key_scales[:, :, None], values.float() * value_scales[..., None]]
    return found


def make_batch(contexts: list[int], query_len: int) -> Batch:
    """A uniform step of sequences with `contexts` tokens, two blocks each."""
    tables = 1 + torch.arange(2 * len(contexts), dtype=torch.int32).view(-1, 2)
    positions = torch.tensor([range(context - query_len, context) for context in contexts])
    slots = tables.gather(1, positions // BLOCK_SIZE) * BLOCK_SIZE + positions % BLOCK_SIZE
    starts = torch.arange(len(contexts) + 1, dtype=torch.int32) * query_len
    batch = Batch(
        (7 * positions.flatten()) % 500,
        positions.flatten(),
        slots.flatten().int(),
        tables,
        starts,
        torch.tensor(contexts, dtype=torch.int32),
        None,
    )
    for tensor in batch[:6]:
        torch._dynamo.mark_dynamic(tensor, 0)
    return batch


def step(weights: Weights, batch: Batch, kv_cache: KVCache) -> Tensor:
    query_len = batch.token_ids.shape[0] // batch.context_lens.shape[0]
    return hidden_states(weights, CONFIG, batch._replace(query_len=query_len), kv_cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=["plain", "int8", "e4m3"])
def test_decoding_and_verification_are_one_graph_that_copies_no_cache(dtype: torch.dtype) -> None:
    weights = dummy_weights(CONFIG, torch.bfloat16, torch.device("cpu"), packing=Packing(keeps_plain=True))
    compiled = torch.compile(step, fullgraph=True)

    def run(batch: Batch, cache: KVCache) -> Tensor:
        return compiled(weights, batch, cache)

    with torch.inference_mode():
        _, (source,) = run_and_get_code(run, make_batch([20, 5], 1), make_cache(dtype=dtype))
        for contexts, query_len in (([20, 5], 1), ([9, 17, 4], 4), ([31, 2], 2), ([7] * 15, 3)):
            batch = make_batch(contexts, query_len)
            expected_cache, cache = (make_cache(NUM_BLOCKS + query_len, dtype) for _ in range(2))
            expected = step(weights, batch, expected_cache)
            torch.testing.assert_close(run(batch, cache), expected, atol=2e-2, rtol=2e-2)
            # A difference of one rounding in bfloat16 may be a whole code.
            tolerances = (5e-2, 0.13) if scale_rows(dtype) else (2e-2, 2e-2)
            for one, other in zip(numbers(cache), numbers(expected_cache), strict=True):
                torch.testing.assert_close(one, other, atol=tolerances[0], rtol=tolerances[1])
    assert counters["stats"]["unique_graphs"] == 1
    called = re.findall(r"^ *(?:\w+ = )?torch.ops.dispec.(\w+).default\(", source, re.M)
    assert {name: called.count(name) for name in called} == {
        "rope_cos_sin": 1,
        "qkv_rope_write": CONFIG.num_layers,
        "paged_attention": CONFIG.num_layers,
        "fused_linear": CONFIG.num_layers,
        "linear_residual": 2 * CONFIG.num_layers,
    }
    hidden = rf"empty_strided\w*\(\(\w+, {CONFIG.hidden_size}\)"
    assert len(re.findall(hidden, source)) == 1, "the residual connections are added in place"
    assert not any(str(NUM_BLOCKS) in shape for shape in re.findall(r"empty_strided\w*\(\(([^)]*)\)", source))
    assert not re.search(r"\.clone\(|copy_\(", source)
    assert counters["inductor"].get("possibly_missed_reinplacing_opportunities", 0) == 0


def test_a_residual_that_is_read_again_keeps_its_values() -> None:
    def add(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return ops.linear(x, weight, residual=residual), residual + 1

    x, weight, residual = torch.randn(3, 16), torch.randn(8, 16), torch.randn(3, 8)
    expected = (x @ weight.T + residual, residual + 1)
    for function in (add, torch.compile(add, fullgraph=True)):
        torch.testing.assert_close(function(x, weight, residual), expected)
