"""The Triton kernels on a CUDA device, through the registered ops, against oracles in float64."""

import math
import random

import pytest
import torch
from torch import Tensor

from dispec import ops
from dispec.ops import reference
from dispec.ops.kv_cache import codes_and_scales, quantize_heads, scale_rows
from tests.argmax_cases import rows_with_first_largest
from tests.layer_cases import (
    Shape,
    expect_product,
    expect_projection,
    make_projection,
    product_arguments,
    products,
)
from tests.threshold_cases import cases, expect_thresholds, weights_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
GROUPS = [(14, 2), (12, 2), (9, 3), (4, 4), (8, 1), (32, 8), (16, 1)]


def attention_in_float64(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: list[int], contexts: list[int], scale: float
) -> Tensor:
    """Compute `reference.paged_attention` by sequence instead of by token, in float64."""
    group, block_size = query.shape[1] // keys.shape[1], keys.shape[3]
    outputs = []
    for sequence, (length, context, q) in enumerate(
        zip(lengths, contexts, query[: sum(lengths)].double().split(lengths), strict=True)
    ):
        if context == 0 or length == 0:
            outputs.append(torch.zeros_like(q))
            continue
        blocks = tables[sequence, : math.ceil(context / block_size)].long()
        k = keys[blocks].double().permute(0, 3, 1, 2).flatten(0, 1)[:context].repeat_interleave(group, 1)
        v = values[blocks].double().permute(0, 2, 1, 3).flatten(0, 1)[:context].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        position = torch.arange(context - length, context, device=query.device)
        hidden = torch.arange(context, device=query.device)[None] > position[:, None]
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def poisoned_cache(
    contexts: list[int], kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, columns: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (keys, values, block_tables): shuffled blocks, NaN and table entries out of range past every context."""
    needed = [math.ceil(context / block_size) for context in contexts]
    columns = max([*needed, 1, columns])
    num_blocks = sum(needed) + 2
    keys = torch.randn(num_blocks, kv_heads, head_dim, block_size, device="cuda").to(dtype)
    values = torch.randn(num_blocks, kv_heads, block_size, head_dim, device="cuda").to(dtype)
    keys[0] = values[0] = math.nan
    order = (torch.randperm(num_blocks - 1) + 1).tolist()
    tables = torch.full((len(contexts), columns), 2**30, dtype=torch.int32)
    for sequence, context in enumerate(contexts):
        for column in range(needed[sequence]):
            tables[sequence, column] = order.pop()
        if context % block_size:
            last = int(tables[sequence, needed[sequence] - 1])
            keys[last, :, :, context % block_size :] = math.nan
            values[last, :, context % block_size :] = math.nan
    for block in order:
        keys[block] = values[block] = math.nan
    return keys, values, tables.cuda()


def quantized(keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the pages quantised by torch on the host. NaN stays NaN: its scale is."""
    num_blocks, kv_heads, head_dim, block_size = keys.shape
    rows = head_dim + scale_rows(dtype)
    pages = (
        torch.zeros(num_blocks, kv_heads, rows, block_size, dtype=dtype),
        torch.zeros(num_blocks, kv_heads, block_size, rows, dtype=dtype),
    )
    key, value = keys.cpu().permute(0, 3, 1, 2).flatten(0, 1), values.cpu().permute(0, 2, 1, 3).flatten(0, 1)
    ops.write_kv(*pages, key, value, torch.arange(num_blocks * block_size))
    return pages[0].cuda(), pages[1].cuda()


def dequantized(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    (keys, key_scales), (values, value_scales) = codes_and_scales(keys, values)
    return keys.double() * key_scales[:, :, None], values.double() * value_scales[..., None]


def query_view(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    rows = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device="cuda").to(dtype)
    return rows[:, : heads * head_dim].view(tokens, heads, head_dim)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()


def expect_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def compare(
    lengths: list[int],
    contexts: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    uniform: bool,
    columns: int = 0,
    cache_dtype: torch.dtype | None = None,
) -> None:
    keys, values, tables = poisoned_cache(contexts, kv_heads, head_dim, block_size, dtype, columns)
    pages = (keys, values)
    if cache_dtype is not None:
        pages = quantized(keys, values, cache_dtype)
        keys, values = dequantized(*pages)
    query = query_view(sum(lengths), heads, kv_heads, head_dim, dtype)
    lens = torch.tensor(contexts, dtype=torch.int32).cuda()
    scale = head_dim**-0.5
    # The allocator gives the output memory that holds NaN.
    torch.full((sum(lengths), heads, head_dim), math.nan, dtype=dtype, device="cuda")
    actual = ops.paged_attention(query, *pages, tables, starts(lengths), lens, lengths[0] if uniform else None, scale)
    expect_close(actual, attention_in_float64(query, keys, values, tables, lengths, contexts, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_decode(head_dim: int, dtype: torch.dtype) -> None:
    chance = random.Random(f"{head_dim} {dtype}")
    torch.manual_seed(head_dim)
    for _ in range(6):
        heads, kv_heads = chance.choice(GROUPS)
        block_size, query_len = chance.choice([16, 32, 64]), chance.choice([1, 1, 2, 5, 8, 16])
        contexts = [
            chance.choice([0, query_len, 64 + query_len - 1, 128, chance.randint(query_len, 700)])
            for _ in range(chance.choice([1, 3, 20]))
        ]
        columns = chance.choice([0, 128, 2048])
        compare([query_len] * len(contexts), contexts, heads, kv_heads, head_dim, block_size, dtype, True, columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_ragged(head_dim: int, dtype: torch.dtype) -> None:
    chance = random.Random(f"ragged {head_dim} {dtype}")
    torch.manual_seed(head_dim)
    for _ in range(6):
        heads, kv_heads = chance.choice(GROUPS)
        lengths = [chance.choice([0, 1, 1, 2, 16, chance.randint(1, 300)]) for _ in range(chance.choice([1, 4, 20]))]
        lengths[chance.randrange(len(lengths))] = 130
        contexts = [length + chance.choice([0, 0, 1, 64, chance.randint(0, 500)]) for length in lengths]
        compare(lengths, contexts, heads, kv_heads, head_dim, chance.choice([16, 32, 64]), dtype, False)


quantized_types = pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])


@quantized_types
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_quantized_caches(head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    chance = random.Random(f"quantized {head_dim} {dtype} {cache_dtype}")
    torch.manual_seed(head_dim)
    for _ in range(3):
        heads, kv_heads = chance.choice(GROUPS)
        block_size, query_len = chance.choice([16, 32, 64]), chance.choice([1, 1, 2, 5, 16])
        lengths = [query_len] * chance.choice([1, 3, 20])
        contexts = [chance.choice([0, query_len, 63 + query_len, chance.randint(query_len, 700)]) for _ in lengths]
        columns = chance.choice([0, 128, 2048])
        shape = (heads, kv_heads, head_dim, block_size, dtype)
        compare(lengths, contexts, *shape, True, columns, cache_dtype)
        lengths = [chance.choice([0, 1, 16, 130, chance.randint(1, 300)]) for _ in range(6)]
        contexts = [length + chance.choice([0, 1, 64, chance.randint(0, 500)]) for length in lengths]
        compare(lengths, contexts, *shape, False, 0, cache_dtype)


@quantized_types
@pytest.mark.parametrize("block_size", [16, 64])
def test_long_quantized_contexts(block_size: int, cache_dtype: torch.dtype) -> None:
    shape = (12, 2, 128, block_size, torch.bfloat16)
    compare([1], [32_000], *shape, True, 0, cache_dtype)
    compare([5] * 2, [20_001, 37], *shape, True, 0, cache_dtype)
    compare([600, 1], [9_000, 9_000], *shape, False, 0, cache_dtype)
    compare([2_100], [2_100], *shape, False, 0, cache_dtype)


@quantized_types
@pytest.mark.parametrize("tokens", [1, 37, 600])
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (80, 32), (128, 16), (256, 64)])
def test_write_quantized(head_dim: int, block_size: int, tokens: int, cache_dtype: torch.dtype) -> None:
    """Codes and scales have the bits of torch's on the host; all else keeps its bits."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        num_blocks = tokens // block_size + 5
        rows = torch.randn(tokens, 7, 2, head_dim, device="cuda").mul(torch.rand(tokens, 7, 2, 1, device="cuda").exp2())
        rows = rows.to(dtype)
        rows[0, 5, 0], rows[0, 6, 1, :3] = 0, 0.5
        page = (head_dim + 4) * block_size
        before = torch.randint(256, (2, num_blocks, 2, page), dtype=torch.uint8)
        keys, values = (half.clone().cuda().view(cache_dtype) for half in before)
        keys, values = keys.view(num_blocks, 2, -1, block_size), values.view(num_blocks, 2, block_size, -1)
        slots = torch.randperm(num_blocks * block_size, device="cuda")[:tokens]
        expected = [half.clone().view(cache_dtype) for half in before]
        expected = [expected[0].view_as(keys), expected[1].view_as(values)]
        ops.write_kv(*expected, rows[:, 5].cpu(), rows[:, 6].cpu(), slots.cpu())
        ops.write_kv(keys, values, rows[:, 5], rows[:, 6], slots)
        assert torch.equal(keys.cpu().view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(values.cpu().view(torch.uint8), expected[1].view(torch.uint8))


@quantized_types
@pytest.mark.parametrize("has_head_norms", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 33, 600])
def test_projection_to_a_quantized_cache(rows: int, has_head_norms: bool, cache_dtype: torch.dtype) -> None:
    """What is written are the codes of the keys and values that a cache in bfloat16 receives."""
    from dispec.ops.triton.rope_write import KVSlots, rope_write

    torch.manual_seed(rows)
    heads, kv_heads, head_dim, block_size = 12, 2, 128, 16
    projected = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device="cuda").bfloat16()
    norm = (1 + 0.2 * torch.randn(head_dim, device="cuda")).bfloat16() if has_head_norms else None
    angles = 100 * torch.rand(rows, head_dim // 2, device="cuda")
    num_blocks = rows // block_size + 3
    slots = torch.randperm(num_blocks * block_size, device="cuda")[:rows].int()
    plain = torch.zeros(2, num_blocks, kv_heads, head_dim * block_size, dtype=torch.bfloat16, device="cuda")
    coded = torch.zeros(2, num_blocks, kv_heads, (head_dim + 4) * block_size, dtype=cache_dtype, device="cuda")
    queries = []
    for pages in (plain, coded):
        keys = pages[0].view(num_blocks, kv_heads, -1, block_size)
        values = pages[1].view(num_blocks, kv_heads, block_size, -1)
        given = KVSlots(keys, values, slots, angles.cos(), angles.sin())
        queries.append(rope_write(projected, norm, norm, 1e-6, given))
    assert torch.equal(*queries)
    block, offset = slots.cpu().long() // block_size, slots.cpu().long() % block_size
    keys, values = coded.cpu()
    found = codes_and_scales(
        keys.view(num_blocks, kv_heads, -1, block_size), values.view(num_blocks, kv_heads, block_size, -1)
    )
    wanted = (
        plain[0].cpu().view(num_blocks, kv_heads, head_dim, block_size).permute(0, 3, 1, 2)[block, offset],
        plain[1].cpu().view(num_blocks, kv_heads, block_size, head_dim).permute(0, 2, 1, 3)[block, offset],
    )
    for (codes, scales), order, heads_of in zip(found, ((0, 3, 1, 2), (0, 2, 1, 3)), wanted, strict=True):
        expected_codes, expected_scales = quantize_heads(heads_of, cache_dtype)
        assert torch.equal(codes.view(torch.uint8).permute(order)[block, offset], expected_codes.view(torch.uint8))
        assert torch.equal(scales.permute(0, 2, 1)[block, offset], expected_scales)


@quantized_types
def test_copies_of_quantized_blocks(cache_dtype: torch.dtype) -> None:
    keys = torch.randint(256, (3, 9, 2, 68, 16), dtype=torch.uint8, device="cuda").view(cache_dtype)
    values = torch.randint(256, (3, 9, 2, 16, 68), dtype=torch.uint8, device="cuda").view(cache_dtype)
    source, destination = torch.tensor([3, 1, 3], device="cuda"), torch.tensor([0, 8, 5], device="cuda")
    expected = [half.view(torch.uint8).clone() for half in (keys, values)]
    ops.copy_blocks(keys, values, source, destination)
    for half, wanted in zip((keys, values), expected, strict=True):
        for old, new in ((3, 0), (1, 8), (3, 5)):
            wanted[:, new] = wanted[:, old]
        assert torch.equal(half.view(torch.uint8), wanted)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 2, 128), (14, 2, 64)])
def test_long_contexts(heads: int, kv_heads: int, head_dim: int, block_size: int) -> None:
    compare([1], [32_000], heads, kv_heads, head_dim, block_size, torch.bfloat16, True)
    compare([5] * 2, [20_001, 37], heads, kv_heads, head_dim, block_size, torch.bfloat16, True)
    compare([1] * 300, [9_000, *range(299)], heads, kv_heads, head_dim, block_size, torch.bfloat16, True)
    compare([600, 1], [9_000, 9_000], heads, kv_heads, head_dim, block_size, torch.bfloat16, False)
    compare([2_100], [2_100], heads, kv_heads, head_dim, block_size, torch.bfloat16, False)


def test_the_reference_agrees() -> None:
    torch.manual_seed(0)
    lengths, contexts = [3, 0, 1, 7], [3, 5, 40, 23]
    keys, values, tables = poisoned_cache(contexts, 2, 64, 16, torch.float32)
    query = query_view(sum(lengths), 6, 2, 64, torch.float32)
    lens = torch.tensor(contexts, dtype=torch.int32).cuda()
    actual = ops.paged_attention(query, keys, values, tables, starts(lengths), lens, None, 0.125)
    arguments = [tensor.cpu() for tensor in (query, keys, values, tables, starts(lengths), lens)]
    expect_close(actual.cpu(), reference.paged_attention(*arguments, 0.125))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [1, 37, 3000])
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (80, 32), (96, 16), (128, 16), (256, 64)])
def test_write_kv(head_dim: int, block_size: int, tokens: int, index_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        num_blocks = tokens // block_size + 5
        keys = torch.randn(num_blocks, 2, head_dim, block_size, device="cuda").to(dtype)
        values = torch.randn(num_blocks, 2, block_size, head_dim, device="cuda").to(dtype)
        rows = torch.randn(tokens, 7, 2, head_dim, device="cuda").to(dtype)
        slots = torch.randperm(num_blocks * block_size, device="cuda")[:tokens].to(index_dtype)
        expected = [tensor.cpu() for tensor in (keys, values, rows[:, 5], rows[:, 6], slots)]
        reference.write_kv(*expected)
        ops.write_kv(keys, values, rows[:, 5], rows[:, 6], slots)
        assert torch.equal(keys.cpu(), expected[0])
        assert torch.equal(values.cpu(), expected[1])


def test_caches_of_more_than_two_billion_elements() -> None:
    kv_heads, head_dim, block_size = 2, 128, 16
    num_blocks = 2**31 // (kv_heads * head_dim * block_size) + 100
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of device memory")
    keys = torch.zeros(num_blocks, kv_heads, head_dim, block_size, dtype=torch.bfloat16, device="cuda")
    values = torch.zeros(num_blocks, kv_heads, block_size, head_dim, dtype=torch.bfloat16, device="cuda")
    tables = torch.arange(num_blocks - 4, num_blocks, dtype=torch.int32, device="cuda")[None]
    slots = torch.arange(64, device="cuda") + int(tables[0, 0]) * block_size
    rows = torch.randn(64, 2, kv_heads, head_dim, device="cuda").bfloat16()
    ops.write_kv(keys, values, rows[:, 0], rows[:, 1], slots)
    query = query_view(64, 12, kv_heads, head_dim, torch.bfloat16)
    lens = torch.tensor([64], dtype=torch.int32, device="cuda")
    prefilled = ops.paged_attention(query, keys, values, tables, starts([64]), lens, None, 0.1)
    expected = attention_in_float64(query, keys, values, tables, [64], [64], 0.1)
    expect_close(prefilled, expected)
    decoded = ops.paged_attention(query[-1:], keys, values, tables, starts([1]), lens, 1, 0.1)
    expect_close(decoded, expected[-1:])


@pytest.mark.parametrize("query_len", [1, 5])
def test_a_captured_decode_follows_its_inputs(query_len: int) -> None:
    """One recording serves every context length and block table that fits its buffers."""
    torch.manual_seed(0)
    batch, heads, kv_heads, head_dim, block_size, columns = 4, 12, 2, 128, 16, 512
    query = query_view(batch * query_len, heads, kv_heads, head_dim, torch.bfloat16)
    tables = torch.zeros(batch, columns, dtype=torch.int32, device="cuda")
    lens = torch.full((batch,), query_len, dtype=torch.int32, device="cuda")
    query_start = starts([query_len] * batch)
    steps = [[3000, 17, 64, 5], [8000, 8192, 0, 4097], [query_len] * batch]
    caches = [poisoned_cache(contexts, kv_heads, head_dim, block_size, torch.bfloat16, columns) for contexts in steps]
    size = max(cache[0].shape[0] for cache in caches)
    keys = torch.zeros(size, *caches[0][0].shape[1:], dtype=torch.bfloat16, device="cuda")
    values = torch.zeros(size, *caches[0][1].shape[1:], dtype=torch.bfloat16, device="cuda")

    def attend() -> Tensor:
        return ops.paged_attention(query, keys, values, tables, query_start, lens, query_len, 0.1)

    attend()  # compile before capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend()
    for contexts, (new_keys, new_values, new_tables) in zip(steps, caches, strict=True):
        keys[: len(new_keys)] = new_keys
        values[: len(new_values)] = new_values
        tables.copy_(new_tables)
        lens.copy_(torch.tensor(contexts))
        query.copy_(torch.randn_like(query))
        output.fill_(math.nan)
        graph.replay()
        expected = attention_in_float64(query, keys, values, tables, [query_len] * batch, contexts, 0.1)
        expect_close(output, expected)


@pytest.mark.parametrize("query_len", [1, None])
def test_registration(query_len: int | None) -> None:
    keys, values, tables = poisoned_cache([20, 33], 2, 64, 16, torch.float32)
    tables.clamp_(max=len(keys) - 1)
    query = query_view(2, 6, 2, 64, torch.float32)
    lens = torch.tensor([20, 33], dtype=torch.int32, device="cuda")
    checks = ("test_schema", "test_faketensor")
    arguments = (query, keys.nan_to_num(), values.nan_to_num(), tables, starts([1, 1]), lens, query_len, 0.125)
    torch.library.opcheck(torch.ops.dispec.paged_attention.default, arguments, test_utils=checks)
    rows = torch.randn(3, 2, 64, device="cuda")
    slots = torch.tensor([3, 4, 17], device="cuda")
    written = (keys.nan_to_num(), values.nan_to_num(), rows, rows, slots)
    torch.library.opcheck(torch.ops.dispec.write_kv.default, written, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [5, 5_003, 151_936])
def test_argmax(size: int, dtype: torch.dtype) -> None:
    logits, expected = rows_with_first_largest(size, dtype)
    on_device = logits.cuda()
    for _ in range(3):
        assert ops.argmax(on_device).tolist() == expected
    for row in range(len(logits)):
        assert ops.argmax(on_device[row : row + 1]).tolist() == expected[row : row + 1]
    many = on_device[:, :5003].repeat(300, 1)  # more rows than there are counters
    assert torch.equal(ops.argmax(many), many.argmax(-1))
    assert ops.argmax(on_device.T.contiguous().T).tolist() == expected


@pytest.mark.parametrize("size", [1, 100, 5_003])
def test_token_threshold(size: int) -> None:
    weights, top_k, top_p = cases(size)
    actual = ops.token_threshold(weights.cuda(), top_k.cuda(), top_p.cuda()).cpu()
    expect_thresholds(actual, weights, top_k, top_p)


@pytest.mark.parametrize("size", [50_257, 151_936, 262_144])
def test_token_threshold_of_a_large_vocabulary(size: int) -> None:
    torch.manual_seed(0)
    settings = [(50, 1.0), (size, 0.95), (2000, 0.9), (1, 0.5), (size, 1.0), (size - 1, 0.3), (size, 1e-9)]
    top_k, top_p = (torch.tensor(column) for column in zip(*settings * 3, strict=True))
    spread = torch.tensor([0.3, 3.0, 8.0]).repeat_interleave(len(settings))
    weights = weights_of((torch.randn(len(spread), size) * spread[:, None]).bfloat16())
    actual = ops.token_threshold(weights.cuda(), top_k.cuda(), top_p.cuda())
    expect_thresholds(actual.cpu(), weights, top_k, top_p)
    for row in range(len(settings)):
        alone = ops.token_threshold(*(x[row : row + 1].cuda() for x in (weights, top_k, top_p)))
        assert torch.equal(alone, actual[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("features", "columns"), [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960), (896, 896), (4096, 4096)]
)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 32, 64, 65])
def test_skinny_linear(rows: int, features: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight = (torch.randn(features, columns, device="cuda") * columns**-0.5).to(dtype)
    x = torch.randn(rows, columns + 64, device="cuda").to(dtype)[:, :columns]
    for bias in (None, torch.randn(features, device="cuda").to(dtype)):
        actual = ops.linear(x, weight, bias)
        expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
        torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        assert torch.equal(actual, ops.linear(x, weight, bias)), "two calls give the same bits"
    arguments = (x.contiguous(), weight, None, None, 0.0, False)
    torch.library.opcheck(
        torch.ops.dispec.fused_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


SHAPES = {
    "qwen": Shape(1536, 12, 2, 128, 8960),
    "small": Shape(896, 14, 2, 64, 4864),
    "llama": Shape(512, 8, 4, 128, 1024, 64),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 17, 32, 64, 256, 2050])
@pytest.mark.parametrize("name", SHAPES)
def test_linear_of_a_layer(name: str, rows: int, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    for product in products(shape).values():
        arguments = product_arguments(product, rows, dtype, "cuda", seed=rows)
        torch.full((rows, shape.intermediate), math.nan, dtype=dtype, device="cuda")
        if product.adds:
            total = torch.randn(rows, product.features, device="cuda").to(dtype)
            actual, again = total.clone(), total.clone()
            torch.ops.dispec.linear_residual(actual, *arguments[:3])
            torch.ops.dispec.linear_residual(again, *arguments[:3])
            expect_product(arguments, actual, total)
        else:
            actual, again = (torch.ops.dispec.fused_linear(*arguments) for _ in range(2))
            expect_product(arguments, actual)
        assert torch.equal(actual, again), "two calls give the same bits"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 17, 32, 64, 256])
@pytest.mark.parametrize("name", SHAPES)
def test_projection_of_a_layer(name: str, rows: int, dtype: torch.dtype) -> None:
    for has_head_norms in (False, True):
        projection = make_projection(
            SHAPES[name],
            rows,
            dtype=dtype,
            device="cuda",
            has_bias=not has_head_norms,
            has_head_norms=has_head_norms,
            seed=rows,
        )
        arguments = projection.arguments()
        query = torch.ops.dispec.qkv_rope_write(*arguments)
        expect_projection(projection, arguments, query)
        assert torch.equal(torch.ops.dispec.qkv_rope_write(*projection.arguments()), query)


@pytest.mark.parametrize("has_head_norms", [False, True])
@pytest.mark.parametrize("rows", [1, 17, 600])
def test_rope_write_of_a_projection(rows: int, has_head_norms: bool) -> None:
    projection = make_projection(
        SHAPES["llama"], rows, dtype=torch.bfloat16, device="cuda", has_head_norms=has_head_norms, seed=rows
    )
    arguments = projection.arguments()
    x, qkv, bias, norm, eps, *rotation, keys, values, slots, query_norm, key_norm = arguments
    projected = torch.ops.dispec.fused_linear(x, qkv, bias, norm, eps, False)
    query = torch.ops.dispec.rope_write(projected, *rotation, keys, values, slots, query_norm, key_norm, eps)
    expect_projection(projection, arguments, query)


@pytest.mark.parametrize("rows", [2, 8, 16, 32])
def test_recorded_gemms_share_their_counters(rows: int) -> None:
    """A recorded chain of GEMMs, some with split-K, equals the GEMMs one by one in every replay."""
    found, dtype = products(SHAPES["qwen"]), torch.bfloat16
    layers = [
        {name: product_arguments(found[name], rows, dtype, "cuda", seed) for name in ("gate_up", "down")}
        for seed in range(3)
    ]
    norm = ops.Norm(layers[0]["gate_up"][3], 1e-6)
    ops.allocate_workspaces(torch.device("cuda"))

    def chain(wait: bool) -> Tensor:
        x = layers[0]["gate_up"][0]
        for layer in layers:
            gated = ops.linear(x, layer["gate_up"][1], norm=norm, is_gated=True)
            x = ops.linear(gated, layer["down"][1], residual=x)
            if wait:
                torch.cuda.synchronize()
        return x

    expected = chain(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = chain(wait=False)
    for _ in range(20):
        output.fill_(math.nan)
        graph.replay()
        assert torch.equal(output, expected)


def test_counters_are_not_allocated_in_a_recording() -> None:
    from dispec.ops.triton.linear_residual import split_counters

    split_counters.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")  # an empty recording is warned of
        with pytest.raises(RuntimeError, match="allocate_workspaces"):
            split_counters(torch.device("cuda", torch.cuda.current_device()))
    ops.allocate_workspaces(torch.device("cuda"))
    assert split_counters.cache_info().currsize == 1


def test_layer_registration() -> None:
    checks = ("test_schema", "test_faketensor")
    shape = SHAPES["llama"]
    for product in products(shape).values():
        arguments = product_arguments(product, 2, torch.bfloat16, "cuda")
        torch.library.opcheck(torch.ops.dispec.fused_linear.default, arguments, test_utils=checks)
        total = torch.zeros(2, product.features, dtype=torch.bfloat16, device="cuda")
        torch.library.opcheck(torch.ops.dispec.linear_residual.default, (total, *arguments[:3]), test_utils=checks)
    projection = make_projection(shape, 2, dtype=torch.bfloat16, device="cuda")
    arguments = tuple(
        value.nan_to_num() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in projection.arguments()
    )
    torch.library.opcheck(torch.ops.dispec.qkv_rope_write.default, arguments, test_utils=checks)
