"""Linear layers with int4 and int8 weights on a CUDA device, through the registered ops, against oracles in float64."""

import random

import pytest
import torch

from dispec import ops
from dispec.ops import reference
from tests.quantized_cases import random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Output features, columns, columns that share a scale.
SHAPES = [(4608, 3584, 128), (1536, 8960, 32), (2050, 1544, 64), (304, 520, 48), (1000, 1536, None), (77, 200, 16)]


def compare(
    kind: ops.Kind,
    tokens: int,
    shape: tuple[int, int, int | None],
    dtype: torch.dtype,
    has_offsets: bool,
    is_gated: bool,
    has_norm: bool,
    in_order: bool = True,
) -> None:
    """Compare a layer of every fusion with the oracle; its error has the size of one rounding of the output."""
    features, columns, group = shape
    weight = random_weight(kind, features, columns, group, has_offsets).to(torch.device("cuda"))
    if not in_order:
        order = torch.randperm(columns, device="cuda")
        weight = type(weight)(kind, weight.codes, weight.scales, weight.offsets, weight.group_size, order)
    x = torch.randn(tokens, columns, device="cuda").to(dtype)
    norm = torch.randn(columns, device="cuda").to(dtype) if has_norm else None
    bias = None if is_gated else torch.randn(features, device="cuda").to(dtype)
    made = features // 2 if is_gated else features
    residual = torch.randn(tokens, made, device="cuda").to(dtype)
    exact = weight.dequantize(torch.float64)
    wide = x.double()
    if norm is not None:  # rounded to the type of x, as every path does
        wide = ops.rms_norm(x, ops.Norm(norm, 1e-6)).double()
    expected = reference.linear(wide, exact, bias, None, 0.0, is_gated) + residual.double()
    # The allocator gives the output memory that holds NaN.
    torch.full((tokens, made), float("nan"), dtype=dtype, device="cuda")
    rms = None if norm is None else ops.Norm(norm, 1e-6)
    actual = ops.linear(x, ops.pack(weight), bias, norm=rms, residual=residual, is_gated=is_gated)
    assert actual.dtype is dtype
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    # With many tokens the weight and the gate are rounded as well, and a gated feature multiplies two sums.
    scale = expected.abs().mean()
    allowed = (24 if tokens > 64 or is_gated or has_norm else 3) * rounding * scale
    allowed = allowed + (16 if is_gated else 2) * rounding * expected.abs()
    excess = (actual.double() - expected).abs() - allowed
    assert (excess <= 0).all(), f"by {float(excess.max() / scale):.2e} of the mean magnitude"


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(kind: ops.Kind, dtype: torch.dtype, shape: tuple[int, int, int | None]) -> None:
    torch.manual_seed(0)
    chance = random.Random(f"{kind} {dtype} {shape}")
    ops.allocate_workspaces(torch.device("cuda"))
    for tokens in (1, 7, 16, 31, 64, 100, 300):
        is_gated = shape[0] % 2 == 0 and chance.random() < 0.5
        compare(kind, tokens, shape, dtype, chance.random() < 0.4, is_gated, chance.random() < 0.5)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_columns_in_another_order(kind: ops.Kind) -> None:
    compare(kind, 5, (304, 512, 128), torch.bfloat16, False, is_gated=False, has_norm=True, in_order=False)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_rows_of_the_embedding(kind: ops.Kind) -> None:
    weight = random_weight(kind, 1003, 1544, 32, has_offsets=True).to(torch.device("cuda"))
    ids = torch.tensor([1002, 0, 16, 16], device="cuda")
    assert torch.equal(ops.embedding(ops.pack(weight), ids, 1544), weight.dequantize(torch.bfloat16)[ids])


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_every_replay_of_a_graph_gives_the_same_bits(kind: ops.Kind, tokens: int) -> None:
    torch.manual_seed(1)
    ops.allocate_workspaces(torch.device("cuda"))
    weight = ops.pack(random_weight(kind, 1536, 8960, 128, has_offsets=False).to(torch.device("cuda")))
    x, residual = (torch.randn(tokens, size, device="cuda").bfloat16() for size in (8960, 1536))
    expected = ops.linear(x, weight, residual=residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = ops.linear(x, weight, residual=residual)
    for _ in range(5):
        actual.zero_()
        graph.replay()
        assert torch.equal(actual, expected)
