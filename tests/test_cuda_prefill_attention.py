"""The prefill attention kernel for Hopper: as the compiler leaves it, and its results against float64."""

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dispec import ops
from dispec.ops.cuda import prefill_attention
from dispec.ops.cuda.prefill_attention import BLOCK_SIZES, constants, min_shared_context, shared_bytes
from tests.cuda_cubins import compiled, instructions, needs_hopper, needs_nvrtc, usage
from tests.test_gpu_kernels import attention_in_float64, poisoned_cache, query_view, starts

MOST_SHARED_BYTES = 227 * 1024  # of a block
MOST_REGISTERS = 168  # a thread's at the start, where a block has 384: 65536 in all


@needs_nvrtc
@pytest.mark.parametrize(("head_dim", "block_size"), [*((128, size) for size in BLOCK_SIZES), (64, 32)])
def test_the_kernel_fits_and_overlaps(head_dim: int, block_size: int) -> None:
    code = compiled("prefill_attention.cu", constants(head_dim, 6, block_size, torch.bfloat16))
    used = usage(code, "prefill_attention")
    assert used.local_bytes == used.stack_bytes == 0
    assert used.registers <= MOST_REGISTERS
    assert shared_bytes(head_dim) <= MOST_SHARED_BYTES
    sass = instructions(code)
    assert "UTMALDG" in sass
    assert "HMMA" not in sass.replace("HGMMA", "")
    # Scores and the output of the step before are two runs of products, without a wait between any two of a run. The
    # weights are computed between the wait for the scores and the wait for the output.
    loop = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1 ", sass)
    assert len(loop) == 2
    products = [run.count("HGMMA") for run in re.split(r"WARPGROUP\.ARRIVE", loop[0])[-2:]]
    assert products == [head_dim // 16, 128 // 16]
    assert loop[1].split("WARPGROUP.DEPBAR")[0].count("MUFU.EX2") >= 64


def test_tiles_are_shared_where_multiprocessors_would_idle() -> None:
    def shares(num_tokens: int, context: int, num_tiles: int) -> bool:
        return context >= min_shared_context(num_tokens, num_tiles, 132)

    # 12 query heads on 2: tiles of 21 tokens. 1.5 rounds of 132, 5.9 rounds, 0.2 rounds; a longer context each.
    assert [shares(2048, context, 196) for context in (2048, 8192)] == [False, True]
    assert [shares(8192, context, 782) for context in (8192, 32768)] == [False, False]
    assert [shares(256, context, 26) for context in (256, 4096)] == [False, True]


def test_the_kernel_gets_integers_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        prefill_attention, "_kernel", lambda *_: SimpleNamespace(launch=lambda *given: launches.append(given))
    )
    monkeypatch.setattr(prefill_attention, "tensor_map", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    query, keys, values = torch.zeros(5, 4, 64), torch.zeros(3, 2, 64, 16), torch.zeros(3, 2, 16, 64)
    given = torch.tensor([[2, 0, 7], [1, 7, 7]])[:, :2], torch.tensor([0, 3, 5]), torch.tensor([20, 2])
    prefill_attention.prefill(query, keys, values, *given, 0.125)
    passed = [argument for argument in launches[0] if isinstance(argument, torch.Tensor)][1:]
    assert [tensor.dtype for tensor in passed] == [torch.int32] * 3
    assert all(torch.equal(tensor.long(), original) for tensor, original in zip(passed, given, strict=True))
    assert launches[0][10] == passed[0].stride(0)


@pytest.mark.gpu
@needs_hopper
class TestOnDevice:
    """Ragged steps, with NaN in all slots past a context and page numbers out of range past its last page."""

    @pytest.mark.parametrize("shared_from", [0, 2**31], ids=["shared", "alone"])
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "head_dim", "block_size", "dtype"),
        [
            (12, 2, 128, 16, torch.bfloat16),
            (12, 2, 128, 32, torch.bfloat16),
            (12, 2, 128, 64, torch.bfloat16),
            (12, 2, 128, 32, torch.float16),
            (28, 4, 128, 64, torch.bfloat16),
            (8, 8, 128, 32, torch.bfloat16),
            (14, 2, 64, 32, torch.bfloat16),
            (9, 3, 64, 64, torch.float16),
        ],
    )
    @pytest.mark.parametrize(
        ("lengths", "contexts"),
        [
            ([300, 0, 1, 65, 130, 3, 5], [300, 0, 777, 1065, 130, 4097, 0]),
            ([2048, 600], [2100, 1000]),  # more tiles than multiprocessors
        ],
        ids=["short", "long"],
    )
    def test_prefill(
        self,
        lengths: list[int],
        contexts: list[int],
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        shared_from: int,
    ) -> None:
        keys, values, tables = poisoned_cache(contexts, kv_heads, head_dim, block_size, dtype)
        query = query_view(sum(lengths), heads, kv_heads, head_dim, dtype)
        assert prefill_attention.has_kernel(query, keys, values)
        lens = torch.tensor(contexts, dtype=torch.int32, device="cuda")
        arguments = (query, keys, values, tables, starts(lengths), lens, head_dim**-0.5, shared_from)
        actual = prefill_attention.prefill(*arguments)
        expected = attention_in_float64(query, keys, values, tables, lengths, contexts, head_dim**-0.5)
        tolerance = 4e-3 if dtype is torch.float16 else 2e-2
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(actual, prefill_attention.prefill(*arguments))

    def test_the_op_runs_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keys, values, tables = poisoned_cache([70], 2, 128, 32, torch.bfloat16)
        query = query_view(70, 12, 2, 128, torch.bfloat16)
        lens = torch.tensor([70], dtype=torch.int32, device="cuda")
        arguments = (query, keys, values, tables, starts([70]), lens)
        expected = prefill_attention.prefill(*arguments, 0.125)
        monkeypatch.delattr("dispec.ops.triton.prefill_attention.prefill_kernel")
        assert torch.equal(ops.paged_attention(*arguments, None, 0.125), expected)

    def test_a_layer_of_a_stacked_cache_and_padding(self) -> None:
        keys, values, tables = poisoned_cache([500], 2, 128, 64, torch.bfloat16)
        stacked = [
            torch.full((3, *pages.shape), math.nan, dtype=pages.dtype, device="cuda") for pages in (keys, values)
        ]
        for stack, pages in zip(stacked, (keys, values), strict=True):
            stack[1] = pages
        query = query_view(420, 12, 2, 128, torch.bfloat16)
        assert prefill_attention.has_kernel(query, keys, values)
        lens = torch.tensor([500], dtype=torch.int32, device="cuda")
        actual = prefill_attention.prefill(query, stacked[0][1], stacked[1][1], tables, starts([400]), lens, 0.1)
        expected = attention_in_float64(query, keys, values, tables, [400], [500], 0.1)
        torch.testing.assert_close(actual[:400].double(), expected, atol=2e-2, rtol=2e-2)

    def test_scores_that_grow_along_the_context(self) -> None:
        """The running maximum starts low and rises, and the reverse."""
        for sign in (1, -1):
            keys, values, tables = poisoned_cache([2000], 1, 128, 32, torch.bfloat16)
            query = torch.ones(8, 4, 128, dtype=torch.bfloat16, device="cuda")
            for column, block in enumerate(tables[0, :63].tolist()):
                keys[block] = sign * column / 64
            assert prefill_attention.has_kernel(query, keys, values)
            lens = torch.tensor([2000], dtype=torch.int32, device="cuda")
            actual = prefill_attention.prefill(query, keys, values, tables, starts([8]), lens, 1.0)
            expected = attention_in_float64(query, keys, values, tables, [8], [2000], 1.0)
            torch.testing.assert_close(actual.double(), expected, atol=2e-2, rtol=2e-2)
