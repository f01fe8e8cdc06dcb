"""Random linear layers in e4m3 and what they must return: both operands rounded, multiplied in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from dispec.ops.norm import Norm
from dispec.ops.quantization import Quantization, QuantizedTensor, quantize


class Fp8Case(NamedTuple):
    """Arguments of `ops.linear`."""

    x: Tensor
    weight: QuantizedTensor
    bias: Tensor | None
    norm: Norm | None
    residual: Tensor | None
    is_gated: bool


def make_fp8_case(
    tokens: int,
    features: int,
    columns: int,
    *,
    has_bias: bool = False,
    has_norm: bool = False,
    adds: bool = False,
    is_gated: bool = False,
    device: str = "cpu",
) -> Fp8Case:
    """Return a case on a device. Rows of x differ in size, one is 0 and one nearly, to tell their scales apart."""
    torch.manual_seed(tokens + features)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    x = normal(tokens, columns) * torch.logspace(-2, 2, tokens, device=device)[:, None]
    if tokens > 2:
        x[tokens // 2] = 0
        x[1] = 1e-37
    weight = normal(features, columns) * columns**-0.5 * torch.logspace(-1, 1, features, device=device)[:, None]
    return Fp8Case(
        x.bfloat16(),
        quantize(weight, Quantization("fp8")),
        normal(features).bfloat16() if has_bias else None,
        Norm((1 + 0.2 * normal(columns)).bfloat16(), 1e-6) if has_norm else None,
        normal(tokens, features // 2 if is_gated else features).bfloat16() if adds else None,
        is_gated,
    )


def expected_rows(case: Fp8Case) -> tuple[Tensor, Tensor]:
    """Return the codes [T, K] in e4m3 and the scales [T] of the rows of x, computed on the CPU."""
    rows = case.x.cpu().float()
    if case.norm is not None:
        rows = (rows * (rows.square().mean(1, keepdim=True) + case.norm.eps).rsqrt()).bfloat16().float()
        rows = (rows * case.norm.weight.cpu().float()).bfloat16().float()
    largest = rows.abs().amax(1).clamp(min=2.0**-100)
    inverse = torch.full_like(largest, 448) / largest
    return (rows * inverse[:, None]).to(torch.float8_e4m3fn), largest / torch.full_like(largest, 448)


def expect_fp8(case: Fp8Case, actual: Tensor) -> None:
    """Compare a result with the product of the rounded operands; computed on the device of the case."""
    codes, scales = (part.to(case.x.device) for part in expected_rows(case))
    left = codes.double() * scales.double()[:, None]
    right = case.weight.codes.double() * case.weight.scales.double()
    expected = left @ right.T
    # The size of the products, of which float32 sums may lose 2**-20, the kernels' rounding of 128 sums included.
    sizes = left.abs() @ right.abs().T
    if case.bias is not None:
        expected += case.bias.double()
    if case.is_gated:
        gate, up = expected.chunk(2, 1)
        expected = gate * torch.sigmoid(gate) * up
        # Each half is off by less than a thousandth of its products' size.
        gate_sizes, up_sizes = sizes.chunk(2, 1)
        sizes = gate_sizes * up.abs() + up_sizes * gate.abs()
    if case.residual is not None:
        expected += case.residual.double()
    assert actual.is_contiguous()
    assert actual.dtype is torch.bfloat16
    assert actual.shape == expected.shape
    difference = (actual.double() - expected).abs()
    # Sums of squares in another order may round single elements of a normed row to the neighbouring code. bfloat16 has
    # steps of 2**-8; before a gate or a residual a GEMM of torch's rounds as well.
    rounded = expected.abs() + (0 if case.residual is None else case.residual.abs())
    allowed = (1e-3 if case.norm is None else 4e-3) * sizes + 2**-7 * rounded
    assert (difference <= allowed + 1e-6).all(), f"{(difference - allowed).max()} beyond what rounding explains"
