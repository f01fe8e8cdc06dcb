"""The Triton kernels against the oracles, run by Triton's interpreter on the CPU.

The interpreter must be chosen before Triton is first imported and would leak into every other test, so under
an ordinary pytest this module has one test, which runs the module again in a process of its own.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
    # Loop bounds are arrays of one element there, which numpy no longer turns into integers. Seen with 3.6.
    pytest.skip("the interpreter of this Triton needs numpy before 2.4", allow_module_level=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    def test_kernels_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        # One thread: the interpreter calls numpy on small arrays, where more threads are slower.
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert finished.returncode == 0, finished.stdout[-20000:] + finished.stderr[-5000:]

else:
    from triton.language import float8e4nv
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from dispec.ops import reference, sampling
    from dispec.ops.kv_cache import codes_and_scales, scale_rows
    from dispec.ops.kv_cache import write_kv as write_kv_on_cpu
    from dispec.ops.triton import (
        argmax,
        block_transfer,
        decode_attention,
        kv_cache,
        prefill_attention,
        rope_write,
        skinny_linear,
        token_threshold,
    )
    from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig
    from dispec.ops.triton.tuning import DecodeConfig, PrefillConfig
    from tests.argmax_cases import rows_with_first_largest
    from tests.threshold_cases import cases, expect_thresholds

    # No bfloat16: the interpreter's dot takes its bits for integers. tests/test_gpu_kernels.py covers it.
    TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}

    def query_view(num_tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        """Return queries as in a model: a strided view of the fused projection."""
        rows = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
        return rows[:, : heads * head_dim].view(num_tokens, heads, head_dim)

    def poisoned_cache(
        contexts: list[int], kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, spare_columns: int = 2
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (keys, values, block_tables) with shuffled blocks, NaN past every context.

        Table entries past the context point outside the cache and must not be read.
        """
        needed = [-(-context // block_size) for context in contexts]
        columns = max([*needed, 1]) + spare_columns
        num_blocks = sum(needed) + 3
        free = (torch.randperm(num_blocks - 1) + 1).tolist()
        keys = torch.full((num_blocks, kv_heads, head_dim, block_size), float("nan"), dtype=dtype)
        values = torch.full((num_blocks, kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
        tables = torch.full((len(contexts), columns), 2**30, dtype=torch.int32)
        for sequence, context in enumerate(contexts):
            for column in range(needed[sequence]):
                block, used = free.pop(), min(block_size, context - column * block_size)
                tables[sequence, column] = block
                keys[block, :, :, :used] = torch.randn(kv_heads, head_dim, used).to(dtype)
                values[block, :, :used] = torch.randn(kv_heads, used, head_dim).to(dtype)
        return keys, values, tables

    def quantized_cache(keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the pages quantised, by torch, slot by slot. NaN stays NaN: its scale is."""
        num_blocks, kv_heads, head_dim, block_size = keys.shape
        rows = head_dim + scale_rows(dtype)
        quantized = (
            torch.zeros(num_blocks, kv_heads, rows, block_size, dtype=dtype),
            torch.zeros(num_blocks, kv_heads, block_size, rows, dtype=dtype),
        )
        key, value = keys.permute(0, 3, 1, 2).flatten(0, 1), values.permute(0, 2, 1, 3).flatten(0, 1)
        write_kv_on_cpu(*quantized, key, value, torch.arange(num_blocks * block_size))
        return quantized

    def dequantized(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what quantised pages stand for, in float32."""
        (keys, key_scales), (values, value_scales) = codes_and_scales(keys, values)
        return keys.float() * key_scales[:, :, None], values.float() * value_scales[..., None]

    def starts(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)

    def expect_equal(actual: Tensor, expected: Tensor) -> None:
        assert actual.is_contiguous()
        assert actual.dtype == expected.dtype
        tolerance = TOLERANCE[actual.dtype]
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)

    @pytest.fixture(autouse=True)
    def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
        """Fill what the launchers allocate with NaN or 77, so that a row that is not written shows."""
        torch.manual_seed(0)
        empty = torch.empty

        def poisoned(*size: object, **options: object) -> Tensor:
            tensor = empty(*size, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        monkeypatch.setattr(torch, "empty", poisoned)

    @pytest.mark.parametrize(
        ("query_len", "heads", "kv_heads", "head_dim", "block_size", "num_splits", "dtype"),
        [
            (1, 12, 2, 128, 16, 1, torch.float32),
            (1, 14, 2, 64, 32, 3, torch.float32),
            (1, 6, 2, 80, 16, 2, torch.float32),
            (1, 3, 3, 96, 64, 4, torch.float32),
            (1, 8, 1, 256, 16, 5, torch.float32),
            (2, 14, 2, 64, 16, None, torch.float32),
            (3, 6, 1, 64, 64, 2, torch.float32),
            (5, 6, 2, 128, 32, 3, torch.float16),
            (8, 7, 1, 64, 16, 2, torch.float32),
            (16, 7, 1, 64, 16, 3, torch.float32),  # more rows than one program holds
            (16, 3, 3, 64, 32, 1, torch.float16),
            (4, 16, 2, 64, 16, 20, torch.float16),  # more splits than the combine kernel takes at once
            (1, 12, 2, 128, 16, None, torch.float16),
        ],
    )
    def test_decode(
        query_len: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        num_splits: int | None,
        dtype: torch.dtype,
    ) -> None:
        config = DecodeConfig(block_n=32, num_warps=4, num_stages=2, programs_per_multiprocessor=2)
        long = 32 * 22 if num_splits == 20 else 161
        contexts = [query_len, long, 64, 63 + query_len, 0, 32]
        if query_len > 1:
            contexts.remove(32)
        keys, values, tables = poisoned_cache(contexts, kv_heads, head_dim, block_size, dtype)
        query = query_view(len(contexts) * query_len, heads, kv_heads, head_dim, dtype)
        lens = torch.tensor(contexts, dtype=torch.int32)
        scale = head_dim**-0.5
        actual = decode_attention.decode(query, keys, values, tables, lens, query_len, scale, num_splits, config)
        expected = reference.paged_attention(
            query, keys, values, tables, starts([query_len] * len(contexts)), lens, scale
        )
        expect_equal(actual, expected)

    quantized_types = pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])

    @quantized_types
    @pytest.mark.parametrize(
        ("query_len", "heads", "kv_heads", "head_dim", "block_size", "num_splits", "dtype"),
        [
            (1, 12, 2, 128, 16, 1, torch.float32),
            (1, 6, 2, 80, 16, 2, torch.float16),
            (3, 7, 1, 64, 64, 3, torch.float32),
            (16, 3, 3, 96, 32, 2, torch.float16),
        ],
    )
    def test_decode_of_a_quantized_cache(
        query_len: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        num_splits: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> None:
        config = DecodeConfig(block_n=32, num_warps=4, num_stages=2, programs_per_multiprocessor=2)
        contexts = [query_len, 161, 64, 63 + query_len, 0]
        keys, values, tables = poisoned_cache(contexts, kv_heads, head_dim, block_size, dtype)
        pages = quantized_cache(5 * keys, values / 5, cache_dtype)
        query = query_view(len(contexts) * query_len, heads, kv_heads, head_dim, dtype)
        lens, scale = torch.tensor(contexts, dtype=torch.int32), 0.2 * head_dim**-0.5
        actual = decode_attention.decode(query, *pages, tables, lens, query_len, scale, num_splits, config)
        expected = reference.paged_attention(
            query, *dequantized(*pages), tables, starts([query_len] * len(contexts)), lens, scale
        )
        expect_equal(actual, expected)

    def test_decode_splits_a_long_context_where_the_batch_fills_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decode_attention, "MAX_SPLIT_POSITIONS", 64)
        contexts = [300, 5, 64, 65]
        keys, values, tables = poisoned_cache(contexts, 2, 64, 16, torch.float32)
        query = query_view(len(contexts), 4, 2, 64, torch.float32)
        lens = torch.tensor(contexts, dtype=torch.int32)
        config = DecodeConfig(block_n=32, num_warps=4, num_stages=2, programs_per_multiprocessor=1)
        actual = decode_attention.decode(query, keys, values, tables, lens, 1, 0.125, None, config)
        expect_equal(actual, reference.paged_attention(query, keys, values, tables, starts([1] * 4), lens, 0.125))

    @pytest.mark.parametrize("contexts", [[129, 5, 64, 65, 0, 300], [40, 64, 128, 127, 1, 33]])
    def test_decode_does_not_split_short_contexts(contexts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decode_attention, "MIN_SPLIT_POSITIONS", 128)
        keys, values, tables = poisoned_cache(contexts, 1, 64, 16, torch.float32, spare_columns=0)
        query = query_view(len(contexts), 4, 1, 64, torch.float32)
        lens = torch.tensor(contexts, dtype=torch.int32)
        config = DecodeConfig(block_n=32, num_warps=4, num_stages=2, programs_per_multiprocessor=5)  # 6 of 20 programs
        partial_sums = []
        combine = decode_attention.combine_kernel

        class Recorded:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*arguments: Tensor, **options: int) -> None:
                    partial_sums.append(arguments[2])
                    combine[grid](*arguments, **options)

                return launch

        monkeypatch.setattr(decode_attention, "combine_kernel", Recorded())
        actual = decode_attention.decode(query, keys, values, tables, lens, 1, 0.125, None, config)
        expect_equal(actual, reference.paged_attention(query, keys, values, tables, starts([1] * 6), lens, 0.125))
        is_long = [context > 128 for context in contexts]
        assert len(partial_sums) == any(is_long)  # no second kernel where no context can be long
        for written in partial_sums:
            assert (~written.isnan()).any(-1).all(-1).tolist() == is_long

    @pytest.mark.parametrize("positions", [1, 16, 4096, 4097, 32768, 131072])
    @pytest.mark.parametrize("programs", [1, 2, 64, 4096])
    def test_splits_cover_every_context(programs: int, positions: int) -> None:
        block_n = 64
        balanced, shortest, longest, splits = decode_attention.plan_splits(programs, positions, block_n, 264)
        assert splits * min(longest, 10**9) * block_n >= positions
        for context in {1, min(65, positions), positions // 2, positions} - {0}:
            tiles = -(-context // block_n)
            per_split = max(min(-(-tiles // balanced), longest), shortest)
            assert -(-tiles // per_split) <= splits

    @pytest.mark.parametrize(
        ("heads", "kv_heads", "head_dim", "block_size", "block_m", "dtype"),
        [
            (12, 2, 64, 16, 32, torch.float32),
            (14, 2, 64, 32, 64, torch.float32),
            (3, 1, 80, 16, 16, torch.float32),
            (2, 2, 96, 64, 32, torch.float32),
            (8, 1, 128, 16, 64, torch.float16),
            (4, 4, 64, 16, 32, torch.float16),
            (2, 1, 256, 16, 16, torch.float32),
        ],
    )
    def test_prefill(
        heads: int, kv_heads: int, head_dim: int, block_size: int, block_m: int, dtype: torch.dtype
    ) -> None:
        # Empty sequences first, in a row and last; single tokens; a long prefix; no prefix; whole tiles.
        lengths = [0, 1, 37, 0, 0, 32, 1, 5, 16, 2, 0]
        contexts = [0, 1, 37, 9, 0, 64, 96, 143, 16, 0, 3]
        keys, values, tables = poisoned_cache(contexts, kv_heads, head_dim, block_size, dtype)
        query = query_view(sum(lengths), heads, kv_heads, head_dim, dtype)
        lens = torch.tensor(contexts, dtype=torch.int32)
        config = PrefillConfig(block_m=block_m, block_n=32, num_warps=4, num_stages=2)
        scale = head_dim**-0.5
        actual = prefill_attention.prefill(query, keys, values, tables, starts(lengths), lens, scale, config)
        expect_equal(actual, reference.paged_attention(query, keys, values, tables, starts(lengths), lens, scale))

    @quantized_types
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "head_dim", "block_size", "block_m", "dtype"),
        [(14, 2, 64, 32, 64, torch.float16), (3, 1, 80, 16, 16, torch.float32)],
    )
    def test_prefill_of_a_quantized_cache(
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        block_m: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> None:
        lengths, contexts = [0, 1, 37, 16, 5], [9, 1, 37, 16, 143]
        keys, values, tables = poisoned_cache(contexts, kv_heads, head_dim, block_size, dtype)
        pages = quantized_cache(5 * keys, values / 5, cache_dtype)
        query = query_view(sum(lengths), heads, kv_heads, head_dim, dtype)
        lens, scale = torch.tensor(contexts, dtype=torch.int32), 0.2 * head_dim**-0.5
        config = PrefillConfig(block_m=block_m, block_n=32, num_warps=4, num_stages=2)
        actual = prefill_attention.prefill(query, *pages, tables, starts(lengths), lens, scale, config)
        expected = reference.paged_attention(query, *dequantized(*pages), tables, starts(lengths), lens, scale)
        expect_equal(actual, expected)

    @pytest.mark.parametrize("seed", range(6))
    def test_random_ragged_steps(seed: int) -> None:
        torch.manual_seed(seed)
        group, kv_heads = [1, 3, 6, 7, 8, 2][seed], 1 + seed % 2
        lengths = torch.randint(0, 20, (7,)).tolist()
        contexts = [length + extra for length, extra in zip(lengths, torch.randint(0, 50, (7,)).tolist(), strict=True)]
        keys, values, tables = poisoned_cache(contexts, kv_heads, 64, 16, torch.float32)
        query = query_view(sum(lengths) + 3, group * kv_heads, kv_heads, 64, torch.float32)
        lens = torch.tensor(contexts, dtype=torch.int32)
        actual = prefill_attention.prefill(query, keys, values, tables, starts(lengths), lens, 0.125)
        expected = reference.paged_attention(query, keys, values, tables, starts(lengths), lens, 0.125)
        # Rows past the last sequence are padding and may stay unwritten.
        expect_equal(actual[: sum(lengths)], expected[: sum(lengths)])

    @pytest.fixture
    def _rounded_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
        """Let torch round to e4m3: the interpreter loses the carry of a mantissa and truncates subnormal numbers."""
        convert = InterpreterBuilder.create_fp_to_fp

        def rounded(self: InterpreterBuilder, source, dtype, mode):  # type: ignore[no-untyped-def]
            if dtype.scalar != float8e4nv:
                return convert(self, source, dtype, mode)
            codes = torch.from_numpy(numpy.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
            return TensorHandle(codes.view(torch.uint8).numpy(), dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", rounded)

    @pytest.mark.usefixtures("_rounded_e4m3")
    @quantized_types
    @pytest.mark.parametrize("tokens_per_program", [1, 16])
    def test_rotated_keys_have_the_codes_of_those_in_a_plain_cache(
        monkeypatch: pytest.MonkeyPatch, tokens_per_program: int, cache_dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr(rope_write, "TILED_WRITE_TOKENS", tokens_per_program)
        monkeypatch.setattr(rope_write, "MIN_TILED_WRITE_TOKENS", tokens_per_program)
        tokens, heads, kv_heads, head_dim, block_size = 19, 3, 2, 80, 16
        projected = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).half()
        norm, angles = (1 + 0.2 * torch.randn(head_dim)).half(), 100 * torch.rand(tokens, head_dim // 2)
        slots = torch.randperm(5 * block_size)[:tokens].int()
        plain = torch.zeros(2, 5, kv_heads, head_dim * block_size, dtype=torch.float16)
        coded = torch.zeros(2, 5, kv_heads, (head_dim + 4) * block_size, dtype=cache_dtype)
        queries, pages = [], []
        for cache in (plain, coded):
            keys, values = cache.view(2, 5, kv_heads, -1, block_size)
            values = values.view(5, kv_heads, block_size, -1)
            given = rope_write.KVSlots(keys, values, slots, angles.cos(), angles.sin())
            queries.append(rope_write.rope_write(projected, norm, norm, 1e-6, given))
            pages.append((keys, values))
        assert torch.equal(*queries)
        expected = quantized_cache(*pages[0], cache_dtype)
        assert all(map(torch.equal, *([half.view(torch.uint8) for half in pair] for pair in (pages[1], expected))))
        assert coded.view(torch.uint8).any()

    @pytest.mark.usefixtures("_rounded_e4m3")
    @quantized_types
    @pytest.mark.parametrize(
        ("tokens_per_program", "head_dim", "dtype"), [(1, 80, torch.float32), (16, 64, torch.float16)]
    )
    def test_writes_have_the_bits_of_torchs(
        monkeypatch: pytest.MonkeyPatch,
        tokens_per_program: int,
        head_dim: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> None:
        monkeypatch.setattr(kv_cache, "TILED_WRITE_TOKENS", tokens_per_program)
        monkeypatch.setattr(kv_cache, "MIN_TILED_WRITE_TOKENS", tokens_per_program)
        tokens, block_size = 19, 16
        rows = (torch.randn(tokens, 3, 2, head_dim) * torch.logspace(-3, 3, tokens)[:, None, None, None]).to(dtype)
        rows[0, 1], rows[1, 1, :, 5:] = 0, 0.5
        rows[2, 1], rows[2, 1, :, -1] = torch.arange(head_dim) - 31.5, 127  # ties of int8
        rows[2, 2], rows[2, 2, :, -1] = torch.arange(head_dim) % 8 / 8 + 1 + 1 / 16, 448  # ties of e4m3
        slots = torch.randperm(5 * block_size)[:tokens]
        before = torch.randint(256, (2, 5, 2, (head_dim + 4) * block_size), dtype=torch.uint8).view(cache_dtype)
        found, expected = before.clone(), before.clone()
        for pages, write in ((found, kv_cache.write_kv), (expected, write_kv_on_cpu)):
            keys, values = pages.view(2, 5, 2, -1, block_size)
            write(keys, values.view(5, 2, block_size, -1), rows[:, 1], rows[:, 2], slots)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        assert not torch.equal(found.view(torch.uint8), before.view(torch.uint8))

    @pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
    @pytest.mark.parametrize(
        ("head_dim", "block_size", "dtype"),
        [
            (64, 16, torch.float32),
            (80, 32, torch.bfloat16),
            (96, 64, torch.float32),
            (128, 16, torch.float16),
            (256, 16, torch.float32),
        ],
    )
    @pytest.mark.parametrize("tokens_per_program", [1, 16])
    def test_write_kv(
        monkeypatch: pytest.MonkeyPatch,
        tokens_per_program: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        index_dtype: torch.dtype,
    ) -> None:
        monkeypatch.setattr(kv_cache, "MIN_TILED_WRITE_TOKENS", 0 if tokens_per_program > 1 else 10**9)
        num_tokens, num_blocks, kv_heads = 37, 5, 2
        keys = torch.randn(num_blocks, kv_heads, head_dim, block_size).to(dtype)
        values = torch.randn(num_blocks, kv_heads, block_size, head_dim).to(dtype)
        rows = torch.randn(num_tokens, 4, kv_heads, head_dim).to(dtype)
        slots = torch.randperm(num_blocks * block_size)[:num_tokens].to(index_dtype)
        expected_keys, expected_values = keys.clone(), values.clone()
        reference.write_kv(expected_keys, expected_values, rows[:, 2], rows[:, 3], slots)
        kv_cache.write_kv(keys, values, rows[:, 2], rows[:, 3], slots)
        assert torch.equal(keys, expected_keys)
        assert torch.equal(values, expected_values)

    @pytest.mark.parametrize(("size", "block"), [(1, 8192), (129, 64), (1025, 512)])
    def test_token_threshold(monkeypatch: pytest.MonkeyPatch, size: int, block: int) -> None:
        monkeypatch.setattr(token_threshold, "THRESHOLD_BLOCK", block)
        weights, top_k, top_p = (tensor[size % 3 :: 3] for tensor in cases(size))
        expect_thresholds(token_threshold.token_threshold(weights, top_k, top_p), weights, top_k, top_p)

    def test_token_threshold_ends_on_nan() -> None:
        broken = torch.full((2, 90), float("nan"))
        token_threshold.token_threshold(broken, torch.tensor([5, 90]), torch.tensor([0.5, 0.5]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("size", [5, 32, 33, 128, 1001])
    def test_argmax(monkeypatch: pytest.MonkeyPatch, size: int, dtype: torch.dtype) -> None:
        monkeypatch.setattr(argmax, "ARGMAX_BLOCK", 32)
        logits, expected = rows_with_first_largest(size, dtype)
        for _ in range(2):  # the counters are zero again
            assert argmax.argmax(logits).tolist() == expected
            # As torch calls the op's implementation: without arguments that equal their default.
            assert sampling._argmax_cuda(logits).tolist() == expected
        assert argmax.argmax(logits[:0]).tolist() == []

    @pytest.mark.parametrize("has_bias", [False, True])
    @pytest.mark.parametrize(
        ("rows", "features", "columns", "config"),
        [
            (1, 70, 96, SkinnyGemmConfig(2, 64, 0, 2)),
            (2, 33, 128, SkinnyGemmConfig(4, 64, 0, 2)),
            (3, 8, 80, SkinnyGemmConfig(2, 64, 0, 2)),
            (1, 70, 96, SkinnyGemmConfig(64, 32, 1, 4, 3)),
            (7, 64, 80, SkinnyGemmConfig(32, 64, 1, 4, 3)),
            (17, 130, 128, SkinnyGemmConfig(64, 32, 1, 4, 3)),
            (5, 70, 208, SkinnyGemmConfig(64, 32, 3, 4, 3)),  # 7 tiles in splits of 3, 3 and 1
            (20, 64, 160, SkinnyGemmConfig(32, 32, 4, 4, 3)),  # 5 tiles: no more than 3 splits of 2
            (4, 64, 64, SkinnyGemmConfig(32, 64, 9, 4, 3)),  # one tile: nothing to split
            (0, 64, 64, SkinnyGemmConfig(32, 64, 1, 4, 3)),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_skinny_linear(
        dtype: torch.dtype, rows: int, features: int, columns: int, config: SkinnyGemmConfig, has_bias: bool
    ) -> None:
        wide = torch.randn(rows, columns + 16).to(dtype)
        weight = (torch.randn(features, columns) * columns**-0.5).to(dtype)
        bias = torch.randn(features).to(dtype) if has_bias else None
        x = wide[:, :columns]
        actual = skinny_linear.linear(x, weight, bias, config)
        expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
        expect_equal(actual, expected.to(dtype))

    def test_skinny_linear_without_a_configuration_is_torchs() -> None:
        x, weight = torch.randn(3, 8), torch.randn(5, 8)
        assert torch.equal(skinny_linear.linear(x, weight, None), torch.nn.functional.linear(x, weight))

    @pytest.mark.parametrize("num_words", [64, 100])
    def test_transfer_blocks(monkeypatch: pytest.MonkeyPatch, num_words: int) -> None:
        monkeypatch.setattr(block_transfer, "TILE_WORDS", 32)
        bits = (-(2**63), 2**63 - 1)
        source = [torch.randint(*bits, (2, 5, num_words)) for _ in range(2)]
        cache = [torch.randint(*bits, (2, 9, num_words)) for _ in range(2)]
        theirs, own = torch.tensor([4, 1, 3]), torch.tensor([0, 8, 2])
        expected = [half.clone() for half in cache]
        for half, other in zip(expected, source, strict=True):
            half[:, own] = other[:, theirs]
        folds = block_transfer.transfer_blocks(*source, theirs, *cache, own)
        assert all(map(torch.equal, cache, expected))
        assert torch.equal(folds, reference.fold_blocks(*source, theirs))
        assert torch.equal(block_transfer.fold_blocks(*source, theirs), folds)
        assert block_transfer.fold_blocks(*source, theirs[:0]).shape == (0, 4)
