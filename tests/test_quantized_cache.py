"""Quantised keys and values against oracles that follow from the format of a page, in float64."""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from dispec import ops
from dispec.ops.cpu import attention as cpu_attention
from tests.instruction_sets import EMULATED_AMX, identifier, usable_instruction_sets, use

DTYPES = [torch.bfloat16, torch.float32]
CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}


# AMX kernels read and write the cache with the code of the AVX512 kernels.
KERNELS = [item for item in usable_instruction_sets() if item is not EMULATED_AMX] or ["C++"]


@pytest.fixture(params=[*KERNELS, "torch"], ids=identifier)
def implementation(request, monkeypatch) -> str:
    if request.param == "torch":
        without_kernels(monkeypatch)
        return "torch"
    if request.param != "C++":
        use(request.param, monkeypatch)
    return "C++"


@pytest.fixture(params=KERNELS, ids=identifier)
def kernels(request, monkeypatch) -> None:
    if request.param != "C++":
        use(request.param, monkeypatch)


def without_kernels(monkeypatch) -> None:
    monkeypatch.setattr(cpu_attention, "has_kernels", lambda: False)
    monkeypatch.setattr(cpu_attention, "has_packed_linear", lambda: False)


def code_values(kind: str) -> np.ndarray:
    """The value of each byte as a code; NaN where it is none."""
    codes = np.arange(256)
    if kind == "int8":
        return np.where(codes < 128, codes, codes - 256).astype(np.float64)
    sign, exponent, mantissa = 1 - 2.0 * (codes >> 7), codes >> 3 & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(codes & 127 == 127, np.nan, sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal))


def empty_cache(kind: str, num_blocks: int, kv_heads: int, head_dim: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Pages of bytes 0xff, which are NaN as scales and in e4m3."""
    shapes = (num_blocks, kv_heads, head_dim + 4, block_size), (num_blocks, kv_heads, block_size, head_dim + 4)
    keys, values = (torch.full(shape, 0xFF, dtype=torch.uint8).view(CACHE_DTYPES[kind]) for shape in shapes)
    return keys, values


def page_bytes(pages: Tensor) -> np.ndarray:
    """Return the bytes of each page [NB, KV, bytes], in the same memory."""
    return pages.view(torch.uint8).flatten(2).numpy()


def parts(pages: Tensor, head_dim: int, *, is_key: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes [NB, KV, BS, D] and scales [NB, KV, BS] of pages, in the same memory."""
    raw = page_bytes(pages)
    block_size = raw.shape[2] // (head_dim + 4)
    codes = raw[..., : head_dim * block_size]
    if is_key:
        codes = codes.reshape(*raw.shape[:2], head_dim, block_size).swapaxes(2, 3)
    return codes.reshape(*raw.shape[:2], block_size, head_dim), raw[..., head_dim * block_size :].view(np.float32)


def random_context(
    rng: random.Random, kind: str, contexts: list[int], kv_heads: int, head_dim: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, list[tuple[np.ndarray, np.ndarray]]]:
    """Return a cache with random codes and scales at the tokens of shuffled pages, their block tables, and the keys and
    values [KV, context, D] of each sequence in float64. All other bytes are 0xff."""
    columns = max(2, max(-(-context // block_size) for context in contexts) + rng.randint(0, 2))
    num_blocks = len(contexts) * columns + 3
    cache = empty_cache(kind, num_blocks, kv_heads, head_dim, block_size)
    free = rng.sample(range(1, num_blocks), num_blocks - 1)
    tables = [[free.pop() for _ in range(columns)] for _ in contexts]
    values_of = code_values(kind)
    valid = np.flatnonzero(~np.isnan(values_of)).astype(np.uint8)
    generator = np.random.default_rng(rng.randrange(2**32))
    found = []
    for table, context in zip(tables, contexts, strict=True):
        positions = np.arange(context)
        at = (np.array(table)[positions // block_size], slice(None), positions % block_size)
        halves = []
        for pages, is_key in zip(cache, (True, False), strict=True):
            codes, scales = parts(pages, head_dim, is_key=is_key)
            codes[at] = generator.choice(valid, (context, kv_heads, head_dim))
            # The largest codes stand for about 3; scales differ by a factor of 8.
            scales[at] = 3 / LARGEST[kind] * 2 ** generator.uniform(-3, 0, (context, kv_heads))
            halves.append((values_of[codes[at]] * scales[at][..., None]).swapaxes(0, 1))
        found.append((halves[0], halves[1]))
    return *cache, torch.tensor(tables, dtype=torch.int32), found


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Attend causally from the last tokens, query [q, H, D], to keys and values [KV, context, D]."""
    group, context = query.shape[1] // len(keys), keys.shape[1]
    output = np.zeros(query.shape)
    for row, head in np.ndindex(*query.shape[:2]):
        visible = context - len(query) + 1 + row
        scores = keys[head // group, :visible] @ query[row, head] * scale
        weights = np.exp(scores - scores.max())
        output[row, head] = weights @ values[head // group, :visible] / weights.sum()
    return output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CACHE_DTYPES)
@pytest.mark.parametrize("query_len", [None, 1, 2, 5, 16])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("implementation")
def test_attention(dtype, kind, query_len, seed):
    torch.manual_seed(seed)
    rng = random.Random(f"{dtype} {kind} {query_len} {seed}")
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 3, 4, 7])
    head_dim, block_size = rng.choice([64, 80, 96, 128]), rng.choice([16, 32, 64])
    counts = [query_len or rng.choice((1, 2, 17, 40, 61)) for _ in range(rng.randint(1, 4))]
    contexts = [count + rng.choice((0, 1, 15, 16, 63, 64, 300, 601)) for count in counts]
    keys, values, tables, known = random_context(rng, kind, contexts, kv_heads, head_dim, block_size)
    # A view of a wider row. Products of keys and queries have a standard deviation of about 1.
    query = (torch.randn(sum(counts), group * kv_heads + 2, head_dim) / 1.5).to(dtype)[:, : group * kv_heads]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    lengths = torch.tensor(contexts, dtype=torch.int32)
    scale = head_dim**-0.5
    result = ops.paged_attention(query, keys, values, tables, starts, lengths, query_len, scale)
    assert result.dtype is dtype
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.01, "rtol": 0.01}
    for rows, own, (k, v) in zip(query.split(counts), result.split(counts), known, strict=True):
        expected = torch.from_numpy(attend(rows.double().numpy(), k, v, scale))
        torch.testing.assert_close(own.double(), expected, **close)


@pytest.mark.parametrize("kind", CACHE_DTYPES)
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.usefixtures("kernels")
def test_each_code_and_position_counts(kind, count):
    """One token of the context has all the weight: the result is its value, whose codes are all there are."""
    torch.manual_seed(0)
    head_dim, block_size, context = 128, 16, 600
    keys, values, tables, _ = random_context(random.Random(0), kind, [context], 1, head_dim, block_size)
    meant = code_values(kind)
    valid = np.flatnonzero(~np.isnan(meant)).astype(np.uint8)
    valid = np.resize(valid, 256)  # again from the start, for 254 codes
    key_codes, key_scales = parts(keys, head_dim, is_key=True)
    value_codes, value_scales = parts(values, head_dim, is_key=False)
    largest = np.nanargmax(meant)
    starts, lengths = torch.tensor([0, count], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
    for position in (0, 15, 16, 255, 256, 511, 512, context - count):
        at = tables[0, position // block_size], 0, position % block_size
        for half in (valid[:128], valid[128:]):
            kept = key_codes[at].copy(), key_scales[at].copy()
            key_codes[at], key_scales[at] = largest, 1.0
            value_codes[at], value_scales[at] = half, 0.125
            query = torch.ones(count, 1, head_dim, dtype=torch.bfloat16)
            result = ops.paged_attention(query, keys, values, tables, starts, lengths, None, head_dim**-0.5)
            assert torch.equal(result[:, 0].double(), torch.from_numpy(meant[half] * 0.125).expand(count, -1))
            key_codes[at], key_scales[at] = kept


def odd_heads(dtype: torch.dtype, tokens: int, heads: int, head_dim: int) -> Tensor:
    """Random heads of all magnitudes; some are zeros, one value alone, ties of two codes, or too small to invert."""
    x = torch.randn(tokens, heads, head_dim) * 10.0 ** torch.randint(-4, 5, (tokens, heads, 1))
    x[0] = 0
    x[1] = 0
    x[1, :, 3] = -7
    x[2] = torch.arange(head_dim) - 0.5
    x[2, :, 0] = 127
    x[3] = torch.arange(head_dim) * 0.125 + 0.0625
    x[3, :, 0] = -448
    x[4] = 1e-38 * torch.randn(heads, head_dim)
    return x.to(dtype)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CACHE_DTYPES)
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (80, 32), (96, 64), (128, 16)])
@pytest.mark.usefixtures("implementation")
def test_a_write_stores_the_nearest_codes(dtype, kind, head_dim, block_size):
    torch.manual_seed(head_dim)
    tokens, kv_heads = 40, 3
    key, value = odd_heads(dtype, tokens, kv_heads, head_dim), odd_heads(dtype, tokens, kv_heads, head_dim).flip(1)
    cache = empty_cache(kind, 5, kv_heads, head_dim, block_size)
    slots = torch.randperm(4 * block_size)[:tokens].int() + block_size
    still = torch.ones(tokens, head_dim // 2), torch.zeros(tokens, head_dim // 2)
    projected = torch.cat((torch.randn(tokens, 2, head_dim).to(dtype), key, value), 1).flatten(1)
    query = ops.rope_write(projected, still, *cache, slots)
    assert torch.equal(query.flatten(1), projected[:, : 2 * head_dim])
    at = slots // block_size, slice(None), slots % block_size
    meant = np.sort(code_values(kind)[~np.isnan(code_values(kind))])
    for pages, x, is_key in zip(cache, (key, value), (True, False), strict=True):
        codes, scales = parts(pages, head_dim, is_key=is_key)
        x, found, scale = x.double().numpy(), code_values(kind)[codes[at]], scales[at].astype(np.float64)
        largest = np.abs(x).max(-1)
        np.testing.assert_allclose(scale, largest / LARGEST[kind], rtol=1e-6, atol=1e-44)
        is_small = largest < 2.0**-100
        assert (found[is_small] == 0).all()
        assert is_small.any()
        exact = x / np.where(is_small, 1, largest)[..., None] * LARGEST[kind]
        above = np.searchsorted(meant, exact.clip(meant[0], meant[-1]))
        nearest = np.minimum(abs(meant[above] - exact), abs(meant[np.maximum(above - 1, 0)] - exact))
        # The product is rounded to float32 before it is rounded to a code.
        assert (abs(found - exact) <= nearest + 2.0**-22 * abs(exact))[~is_small].all()
        untouched = np.ones(codes.shape[:3], dtype=bool)
        untouched[at] = False
        assert (codes[untouched] == 0xFF).all()
        assert np.isnan(scales[untouched]).all()


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CACHE_DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.usefixtures("kernels")
def test_the_kernel_writes_the_bytes_of_torch(dtype, kind, has_norm):
    """Also those of one token after another: they depend on that token alone."""
    torch.manual_seed(1)
    tokens, heads, kv_heads, head_dim, block_size = 90, 4, 2, 96, 16
    if not cpu_attention.has_cpu_kernel(CACHE_DTYPES[kind], head_dim, block_size):
        pytest.skip("there are no kernels here")
    heads_of = odd_heads(dtype, tokens, heads + 2 * kv_heads, head_dim)
    angles = torch.rand(tokens, head_dim // 2) * 100
    slots = torch.randperm(9 * block_size)[:tokens].int() + block_size
    norms = [ops.Norm(torch.rand(head_dim).to(dtype), 1e-6) if has_norm else None for _ in range(2)]

    def write(cache: tuple[Tensor, Tensor], chosen: slice = slice(None)) -> None:
        rotation = angles[chosen].cos(), angles[chosen].sin()
        ops.rope_write(heads_of[chosen].flatten(1), rotation, *cache, slots[chosen], *norms)

    plain = torch.zeros(10, kv_heads, head_dim, block_size), torch.zeros(10, kv_heads, block_size, head_dim)
    plain = plain[0].to(dtype), plain[1].to(dtype)
    write(plain)  # gives the rotated keys, to the last bit
    block, offset = slots.long() // block_size, slots.long() % block_size
    expected, whole, single = (empty_cache(kind, 10, kv_heads, head_dim, block_size) for _ in range(3))
    ops.write_kv(*expected, plain[0][block, :, :, offset], plain[1][block, :, offset], slots)
    write(whole)
    for token in range(tokens):
        write(single, slice(token, token + 1))
    for found in (whole, single):
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(page_bytes(one), page_bytes(other))


@pytest.mark.parametrize("kind", CACHE_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72])
def test_copies_and_layers(kind, head_dim, monkeypatch):
    """A block copied in all layers, and a head size without a kernel."""
    torch.manual_seed(0)
    block_size, kv_heads = 16, 2
    layers = [empty_cache(kind, 4, kv_heads, head_dim, block_size) for _ in range(3)]
    keys, values = (torch.stack([layer[i].view(torch.uint8) for layer in layers]) for i in range(2))
    keys, values = keys.view(CACHE_DTYPES[kind]), values.view(CACHE_DTYPES[kind])
    slots = torch.arange(block_size) + block_size
    rotation = torch.ones(block_size, head_dim // 2), torch.zeros(block_size, head_dim // 2)
    for layer in range(3):
        projected = torch.randn(block_size, 3 * kv_heads * head_dim)
        ops.rope_write(projected, rotation, keys, values, slots, layer=layer)
    ops.copy_blocks(keys, values, torch.tensor([1]), torch.tensor([3]))
    query = torch.randn(1, 2, head_dim)
    starts, length = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([block_size], dtype=torch.int32)
    outputs = []
    for layer in range(3):
        both = []
        for block in (1, 3):
            table = torch.tensor([[block, 0]], dtype=torch.int32)
            both.append(ops.paged_attention(query, keys, values, table, starts, length, 1, 0.1, layer))
        assert torch.equal(*both)
        assert not both[0].isnan().any()
        outputs.append(both[0])
    assert not torch.allclose(outputs[0], outputs[1])
    assert math.isnan(parts(keys[0], head_dim, is_key=True)[1][2, 0, 0])


@pytest.mark.parametrize("kind", CACHE_DTYPES)
@pytest.mark.usefixtures("kernels")
def test_attention_of_a_sequence_does_not_depend_on_the_others(kind):
    """To the last bit, over spans and pages, for decodes and prompts."""
    if not cpu_attention.has_cpu_kernel(CACHE_DTYPES[kind], 64, 16):
        pytest.skip("torch does not promise it")
    rng = random.Random(0)
    contexts, counts = [1, 513, 1500, 337], [1, 40, 2, 300]
    keys, values, tables, _ = random_context(rng, kind, contexts, 2, 64, 16)
    query = torch.randn(sum(counts), 6, 64).bfloat16()
    lengths = torch.tensor(contexts, dtype=torch.int32)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    together = ops.paged_attention(query, keys, values, tables, starts, lengths, None, 0.125).split(counts)
    for i, rows in enumerate(query.split(counts)):
        own = torch.tensor([0, counts[i]], dtype=torch.int32)
        alone = ops.paged_attention(rows, keys, values, tables[i : i + 1], own, lengths[i : i + 1], None, 0.125)
        if cpu_attention.has_prefill(torch.bfloat16) or counts[i] <= 16:
            assert torch.equal(alone, together[i])


def test_opcheck():
    torch.manual_seed(0)
    shapes = (5, 3, 68, 16), (5, 3, 16, 68)
    keys, values = (torch.zeros(shape, dtype=torch.int8) for shape in shapes)  # opcheck cannot compare e4m3
    rotation, slots = (torch.rand(4, 32), torch.rand(4, 32)), torch.tensor([16, 40, 41, 79])
    if cpu_attention.has_cpu_kernel(keys.dtype, 64, 16):
        given = (torch.randn(4, 9 * 64), *rotation, keys, values, slots, None, None, 1e-5)
        torch.library.opcheck(torch.ops.dispec.rope_write.default, given)
    torch.library.opcheck(torch.ops.dispec.write_kv.default, (keys, values, *torch.randn(2, 4, 3, 64), slots))
