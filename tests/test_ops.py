"""The registered ops on CPU against their oracles, and against torch's own checks of a custom op."""

import random
import sys

import pytest
import torch

from dispec import ops
from dispec.ops import reference
from dispec.ops.cpu import attention as cpu_attention
from dispec.ops.cpu.library import has_packed_linear
from tests.instruction_sets import identifier, usable_instruction_sets, use


@pytest.fixture(params=[*(usable_instruction_sets() or ["C++"]), "torch"], ids=identifier, autouse=True)
def _implementation(request, monkeypatch):
    """Run each test with the C++ kernels and with torch's, which replace them where they cannot be built."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_attention, "has_kernels", lambda: False)
        modules = (cpu_attention, sys.modules["dispec.ops.linear"], sys.modules[__name__])  # `ops.linear` is a function
        for module in modules:
            monkeypatch.setattr(module, "has_packed_linear", lambda: False)
    elif request.param != "C++":
        use(request.param, monkeypatch)


def cache(num_blocks: int, kv_heads: int, head_dim: int, block_size: int, dtype=torch.float32):
    return (
        torch.randn(num_blocks, kv_heads, head_dim, block_size).to(dtype),
        torch.randn(num_blocks, kv_heads, block_size, head_dim).to(dtype),
    )


def attention_case(
    rng: random.Random,
    query_len: int | None,
    dtype=torch.float32,
    group: int | None = None,
    counts: tuple[int, ...] = (0, 1, 2, 17, 40),
    prefixes: tuple[int, ...] = (0, 1, 15, 16, 48, 63, 64),
):
    """Random inputs of paged_attention: shuffled pages, a query that is a view of a wider row, NaN where nothing
    may be read."""
    kv_heads, group = rng.choice([1, 2, 3]), group or rng.choice([1, 3, 4, 7])
    head_dim, block_size = rng.choice([64, 80, 96, 128, 256]), rng.choice([16, 32, 64])
    sequences = rng.randint(1, 5)
    queries = [query_len if query_len else rng.choice(counts) for _ in range(sequences)]
    contexts = [count + rng.choice(prefixes) for count in queries]
    columns = max(2, max(-(-context // block_size) for context in contexts) + rng.randint(0, 2))
    num_blocks = sequences * columns + 3
    keys, values = cache(num_blocks, kv_heads, head_dim, block_size, dtype)
    free = list(range(1, num_blocks))
    rng.shuffle(free)
    tables = torch.zeros(sequences, columns, dtype=torch.int32)
    written = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for sequence, context in enumerate(contexts):
        for page in range(-(-context // block_size)):
            block = free.pop()
            tables[sequence, page] = block
            written[block, : max(0, min(block_size, context - page * block_size))] = True
    keys.permute(0, 3, 1, 2)[~written] = torch.nan
    values.permute(0, 2, 1, 3)[~written] = torch.nan
    wide = torch.randn(sum(queries), (group + 2) * kv_heads, head_dim).to(dtype)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    query = wide[:, : group * kv_heads]
    return query, keys, values, tables, starts, torch.tensor(contexts, dtype=torch.int32), query_len, head_dim**-0.5


@pytest.mark.smoke
@pytest.mark.parametrize("query_len", [None, 1, 2, 5, 16])
@pytest.mark.parametrize("seed", range(6))
def test_paged_attention(query_len, seed):
    torch.manual_seed(seed)
    case = attention_case(random.Random(f"{query_len} {seed}"), query_len)
    result = ops.paged_attention(*case)
    torch.testing.assert_close(result, reference.paged_attention(*case[:6], case[7]), atol=2e-6, rtol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("query_len", [1, 3])
def test_paged_attention_over_several_spans(query_len):
    """Contexts that a kernel divides, whose parts are combined."""
    torch.manual_seed(0)
    case = attention_case(random.Random(query_len), query_len, prefixes=(500, 700, 1100))
    case[0].mul_(4)  # the largest score of each part differs
    result = ops.paged_attention(*case)
    torch.testing.assert_close(result, reference.paged_attention(*case[:6], case[7]), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("query_len", [None, 1])
@pytest.mark.parametrize("seed", range(4))
def test_paged_attention_in_bfloat16(query_len, seed):
    torch.manual_seed(seed)
    case = attention_case(random.Random(f"{query_len} {seed}"), query_len, torch.bfloat16)
    expected = reference.paged_attention(*case[:6], case[7])
    torch.testing.assert_close(ops.paged_attention(*case), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("query_len", [1, 40])
def test_attention_does_not_hide_nan(dtype, query_len):
    """In a query head, and in a key that all tokens attend to."""
    torch.manual_seed(0)
    keys, values = cache(8, 2, 64, 16, dtype)
    tables, lengths = torch.arange(1, 8).view(1, 7).int(), torch.tensor([80]).int()
    keys[1, 0, 3, 5] = torch.nan  # position 5 of the first key head
    query = torch.randn(query_len, 6, 64).to(dtype)
    query[:, 4, 7] = torch.nan
    result = ops.paged_attention(
        query, keys, values, tables, torch.tensor([0, query_len]).int(), lengths, query_len, 0.125
    )
    expected = torch.zeros(query_len, 6, dtype=torch.bool)
    expected[:, :3] = expected[:, 4] = True
    assert torch.equal(result.isnan(), expected[:, :, None].expand_as(result))


@pytest.mark.smoke
@pytest.mark.parametrize("seed", range(4))
def test_prefill_in_bfloat16(seed):
    """Long enough for several spans and several tasks of a key head."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    case = attention_case(rng, None, torch.bfloat16, group=3, counts=(3, 20, 130, 300), prefixes=(0, 1, 255, 256, 700))
    expected = reference.paged_attention(*case[:6], case[7])
    torch.testing.assert_close(ops.paged_attention(*case), expected, atol=0.01, rtol=0.02)


def test_a_prefill_does_not_depend_on_its_neighbours():
    """Nor on how many of its tokens are computed in one call, to the last bit."""
    if not cpu_attention.has_prefill(torch.bfloat16):
        pytest.skip("torch does not promise it")
    torch.manual_seed(0)
    keys, values = cache(80, 3, 64, 16, torch.bfloat16)
    tables = torch.randperm(80).view(2, 40).int()
    query = torch.randn(500, 9, 64).bfloat16()

    def attend(chosen: list[int], counts: list[int], contexts: list[int], rows: torch.Tensor) -> torch.Tensor:
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        return ops.paged_attention(rows, keys, values, tables[chosen], starts, torch.tensor(contexts), None, 0.125)

    together = attend([0, 1], [300, 200], [300, 600], query)
    assert torch.equal(attend([0], [300], [300], query[:300]), together[:300])
    assert torch.equal(attend([1], [200], [600], query[300:]), together[300:])
    assert torch.equal(attend([1], [37], [600], query[463:]), together[463:])


def test_a_sequence_without_context_is_zero():
    keys, values = cache(4, 1, 64, 16)
    query = torch.randn(2, 3, 64)
    tables = torch.tensor([[0, 0], [1, 0]], dtype=torch.int32)
    starts, contexts = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    result = ops.paged_attention(query, keys, values, tables, starts, contexts, None, 0.125)
    assert (result[0] == 0).all()
    assert (result[1] != 0).all()


@pytest.mark.smoke
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_write_kv(block_size):
    torch.manual_seed(block_size)
    keys, values = cache(5, 3, 64, block_size)
    expected_keys, expected_values = keys.clone(), values.clone()
    key, value = torch.randn(20, 9, 64)[:, 2:5], torch.randn(20, 9, 64)[:, 5:8]
    slots = torch.randperm(4 * block_size)[:20].int() + block_size
    ops.write_kv(keys, values, key, value, slots)
    reference.write_kv(expected_keys, expected_values, key, value, slots)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


def test_copy_blocks():
    keys, values = torch.randn(3, 6, 2, 64, 16), torch.randn(3, 6, 2, 16, 64)
    expected_keys, expected_values = keys.clone(), values.clone()
    source, destination = torch.tensor([1, 4]), torch.tensor([5, 2])
    ops.copy_blocks(keys, values, source, destination)
    reference.copy_blocks(expected_keys, expected_values, source, destination)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


@pytest.mark.smoke
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_rounds_once(rows, bias):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96).bfloat16(), torch.randn(80, 96).bfloat16()
    weight[3] = 0
    weight[5] *= 1000
    offset = torch.randn(80).bfloat16() if bias else None
    packed = ops.pack(weight)
    exact = torch.nn.functional.linear(x.double(), weight.double(), offset.double() if bias else None)
    torch.testing.assert_close(ops.linear(x, packed, offset).double(), exact, atol=0.04, rtol=2**-7)


@pytest.mark.smoke
@pytest.mark.parametrize("rows", [1, 13, 40])
@pytest.mark.parametrize(("features", "columns"), [(192, 96), (70, 33), (96, 40)])
def test_norm_gate_and_residual_of_a_packed_linear(rows, features, columns):
    """Norm, gate and residual are those of separate operations in float32, each rounded where those would round."""
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, columns).bfloat16(), (torch.randn(features, columns) / columns**0.5).bfloat16()
    bias, residual = torch.randn(features).bfloat16(), torch.randn(rows, features).bfloat16()
    norm = ops.Norm(torch.rand(columns).bfloat16(), 1e-5)
    packed = ops.pack(weight)
    normed = torch.nn.functional.rms_norm(x.double(), (columns,), norm.weight.double(), norm.eps)
    product = normed @ weight.double().T + bias.double()
    given = ops.linear(x, packed, bias, norm=norm, residual=residual)
    torch.testing.assert_close(given.double(), product + residual.double(), atol=0.05, rtol=2**-6)
    gate, up = product.chunk(2, dim=-1)
    gated = torch.nn.functional.silu(gate) * up
    given = ops.linear(x, packed, bias, norm=norm, is_gated=True)
    torch.testing.assert_close(given.double(), gated, atol=0.05, rtol=2**-5)
    half = residual[:, : features // 2]
    given = ops.linear(x, packed, bias, norm=norm, residual=half, is_gated=True)
    torch.testing.assert_close(given.double(), gated + half.double(), atol=0.05, rtol=2**-5)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_is_torchs(dtype):
    torch.manual_seed(0)
    for size in (1, 5, 16, 4096, 9001):
        x = torch.randn(7, size + 3).to(dtype)[:, :size]
        assert torch.equal(ops.argmax(x), x.argmax(-1))  # bf16 has many equal largest ones
        x[1], x[2], x[3, size // 2], x[4, -1] = -torch.inf, torch.inf, torch.nan, torch.nan
        x[5] = x[5].round()
        assert ops.argmax(x)[[0, 2, 3, 4, 6]].tolist() == x.argmax(-1)[[0, 2, 3, 4, 6]].tolist()
        assert ops.argmax(x)[1] == 0
        assert ops.argmax(x)[5] == (x[5] == x[5].max()).nonzero()[0, 0]


def token_masks(rows: int, size: int) -> torch.Tensor:
    """Masks of all kinds: no token, one token, all tokens, few words, and random bits."""
    words = torch.randint(-(2**31), 2**31 - 1, (rows, -(-size // 32)), dtype=torch.int32)
    words[0::5] = 0
    words[1::5, : words.shape[1] // 2] = 0
    words[2::5] = -1
    words[3::5] = 0
    words[3::5, -1] = 1
    return words


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_logits_and_their_argmax(dtype):
    torch.manual_seed(1)
    for size in (1, 15, 16, 33, 4096, 9001):
        x = torch.randn(10, size + 3).to(dtype)[:, :size]
        allowed = token_masks(10, size)
        x[4, 0] = x[9, -1] = torch.nan
        expected = reference.mask_tokens(x, allowed)
        found = ops.argmax(x, allowed)
        best = expected.argmax(-1)
        best[~(expected > -torch.inf).any(-1) & ~expected.isnan().any(-1)] = 0
        assert torch.equal(found, best)
        ops.mask_tokens(x, allowed)
        assert torch.equal(x.nan_to_num(3.0), expected.nan_to_num(3.0))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 128])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rope_write(dtype, head_dim, has_norm):
    """Against complex multiplication in float64 and the oracle of the write."""
    torch.manual_seed(head_dim)
    tokens, heads, kv_heads, block_size = 9, 6, 2, 16
    projected = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim + 5).to(dtype)[:, :-5]
    angles = torch.rand(tokens, head_dim // 2) * 100
    keys, values = (torch.full(shape, 0.5, dtype=dtype) for shape in ((5, 2, head_dim, 16), (5, 2, 16, head_dim)))
    expected_keys, expected_values = keys.clone(), values.clone()
    slots = torch.randperm(4 * block_size)[:tokens].int() + block_size
    norms = [ops.Norm(torch.rand(head_dim).to(dtype), 1e-6) if has_norm else None for _ in range(2)]

    def rotated(x: torch.Tensor, norm: ops.Norm | None) -> torch.Tensor:
        x = x.double()
        if norm is not None:
            x = torch.nn.functional.rms_norm(x, (head_dim,), norm.weight.double(), norm.eps)
        pairs = torch.complex(x[..., : head_dim // 2], x[..., head_dim // 2 :])
        turned = pairs * torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    split = projected.unflatten(1, (-1, head_dim)).split((heads, kv_heads, kv_heads), 1)
    reference.write_kv(expected_keys, expected_values, rotated(split[1], norms[1]).to(dtype), split[2], slots)
    query = ops.rope_write(projected, (angles.cos(), angles.sin()), keys, values, slots, *norms)
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.02, "rtol": 2**-6}
    torch.testing.assert_close(query.double(), rotated(split[0], norms[0]), **close)
    torch.testing.assert_close(keys, expected_keys, **close)
    assert torch.equal(values, expected_values)


def test_packed_linear_of_strided_rows():
    x, weight = torch.randn(6, 200).bfloat16(), torch.randn(40, 96).bfloat16()
    for view in (x[:, 7:103], x.T[:96, :5].T):
        assert torch.equal(ops.linear(view, ops.pack(weight)), ops.linear(view.contiguous(), ops.pack(weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_sequence_does_not_depend_on_the_others(dtype):
    """To the last bit, over spans and pages."""
    if not cpu_attention.has_cpu_kernel(dtype, 64, 16):
        pytest.skip("torch does not promise it")
    torch.manual_seed(0)
    contexts = [1, 513, 1500, 37]
    keys, values = (page.to(dtype) for page in cache(120 * 4, 2, 64, 16))
    tables = torch.randperm(120 * 4)[: 4 * 100].view(4, 100).int()
    query = torch.randn(4, 6, 64).to(dtype)

    def attend(chosen: list[int]) -> torch.Tensor:
        starts = torch.arange(len(chosen) + 1, dtype=torch.int32)
        context = torch.tensor([contexts[i] for i in chosen], dtype=torch.int32)
        return ops.paged_attention(query[chosen], keys, values, tables[chosen], starts, context, 1, 0.125)

    together = attend([0, 1, 2, 3])
    for i in range(4):
        assert torch.equal(attend([i])[0], together[i])


def test_only_bfloat16_on_cpu_is_packed():
    weight = torch.randn(8, 16)
    assert ops.pack(weight) is weight


def test_opcheck():
    """Schema, fake implementation and functionalisation agree with what each op does."""
    torch.manual_seed(0)
    keys, values = cache(5, 3, 64, 16)
    key, value = torch.randn(4, 3, 64), torch.randn(4, 3, 64)
    slots = torch.tensor([16, 40, 41, 79])
    torch.library.opcheck(torch.ops.dispec.write_kv.default, (keys, values, key, value, slots))
    pair = torch.tensor([1]), torch.tensor([3])
    torch.library.opcheck(torch.ops.dispec.copy_blocks.default, (keys[None], values[None], *pair))
    if cpu_attention.has_cpu_kernel(keys.dtype, 64, 16):
        rotation = torch.rand(4, 32), torch.rand(4, 32)
        norm = torch.rand(64)
        given = (torch.randn(4, 9 * 64), *rotation, keys, values, slots, norm, norm, 1e-5)
        torch.library.opcheck(torch.ops.dispec.rope_write.default, given)
    torch.library.opcheck(torch.ops.dispec.argmax.default, (torch.randn(3, 50),))
    masked = torch.randn(3, 50), token_masks(3, 50)
    torch.library.opcheck(torch.ops.dispec.argmax.default, masked)
    torch.library.opcheck(torch.ops.dispec.mask_tokens.default, masked)
    for query_len in (None, 1, 3):
        case = attention_case(random.Random(1), query_len)
        case = tuple(item.nan_to_num(0.5) if isinstance(item, torch.Tensor) else item for item in case)
        torch.library.opcheck(torch.ops.dispec.paged_attention.default, case)


def test_opcheck_of_the_tiled_linear():
    if not has_packed_linear():
        pytest.skip("this CPU has neither AVX512-BF16 nor AVX2")
    x, weight, bias = torch.randn(5, 96).bfloat16(), torch.randn(80, 96).bfloat16(), torch.randn(80).bfloat16()
    for offset in (None, bias):
        plain = (x, ops.pack(weight).blocked, 80, offset, None, 0.0, None, False)
        torch.library.opcheck(torch.ops.dispec.tiled_linear.default, plain)
    norm, residual = torch.randn(96).bfloat16(), torch.randn(5, 80).bfloat16()
    fused = (x, ops.pack(weight).blocked, 80, bias, norm, 1e-5, residual, False)
    torch.library.opcheck(torch.ops.dispec.tiled_linear.default, fused)
    gated = (x, ops.pack(weight[:64]).blocked, 64, None, norm, 1e-5, None, True)
    torch.library.opcheck(torch.ops.dispec.tiled_linear.default, gated)


def test_opcheck_of_the_packed_linear():
    # opcheck looks into the storage of its inputs, which a blocked tensor does not have; the op takes a plain
    # weight as well and gives the same result.
    x, weight, bias = torch.randn(5, 96).bfloat16(), torch.randn(80, 96).bfloat16(), torch.randn(80).bfloat16()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN multiplies no bf16 on this CPU")
    packed = ops.pack(weight)
    for offset in (None, bias):
        torch.library.opcheck(torch.ops.dispec.packed_linear.default, (x, weight, offset, 80))
        found = torch.ops.dispec.packed_linear(x, weight, offset, 80)
        torch.testing.assert_close(found, ops.linear(x, packed, offset), atol=1e-3, rtol=2**-7)
