"""GEMMs with int4 and int8 weights in tiles of 32 output features: see linear.cpp and tiles.h."""

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from dispec.ops.cpu.library import Matrix, WeightKind, address, kernel
from dispec.ops.cpu.linear import TILE, multiply
from dispec.ops.cpu.linear import read_rows as read_rows_of
from dispec.ops.huge_pages import on_huge_pages

_KINDS = {"int4": WeightKind.INT4, "int8": WeightKind.INT8}
_LINE_BYTES = 64  # of which the codes of a group take a whole number


def pack(
    kind: str,
    codes: Int8[Tensor, "N K"],
    scales: Float[Tensor, "N G"],
    offsets: Float[Tensor, "N G"] | None,
    group_size: int,
) -> UInt8[Tensor, "tiles bytes"]:
    """Return a matrix in tiles: for each group of columns the codes, the scales and, if there are any, the offsets."""
    out_features, in_features = codes.shape
    if codes.stride(1) != 1:
        codes = codes.contiguous()
    scales = scales.float().contiguous()
    offsets = None if offsets is None else offsets.float().contiguous()
    rows_of_line = _LINE_BYTES // TILE * (2 if kind == "int4" else 1)  # columns of codes in 64 bytes
    whole, rest = divmod(in_features, group_size)
    lines = whole * -(-group_size // rows_of_line) + -(-rest // rows_of_line)
    numbers = scales.shape[1] * (1 if offsets is None else 2)
    data = on_huge_pages(torch.empty(-(-out_features // TILE), (lines + numbers) * _LINE_BYTES, dtype=torch.uint8))
    kernel("pack_quantized")(
        codes.data_ptr(),
        codes.stride(0),
        scales.data_ptr(),
        address(offsets),
        data.data_ptr(),
        out_features,
        in_features,
        _KINDS[kind],
        group_size,
    )
    return data


def matrix(data: Tensor, kind: str, group_size: int, has_offsets: bool) -> Matrix:
    """Return a packed weight as the kernels take it."""
    return Matrix(data.data_ptr(), _KINDS[kind], group_size, has_offsets)


def linear(
    x: Tensor,
    data: Tensor,
    scales: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    kind: str,
    group_size: int,
    has_offsets: bool,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    is_gated: bool,
) -> Tensor:
    """Compute `ops.quantized_linear`. The bits of a row depend on that row alone. scales, offsets: are in `data`."""
    weight = matrix(data, kind, group_size, has_offsets)
    fuses_gate = is_gated and out_features % (2 * TILE) == 0
    y = multiply(x, weight, out_features, bias, norm, eps, None if is_gated else residual, fuses_gate)
    if is_gated and not fuses_gate:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    return residual + y if is_gated and residual is not None else y


def read_rows(data: Tensor, indices: Tensor, in_features: int, kind: str, group_size: int, has_offsets: bool) -> Tensor:
    """Return rows [T, in_features] of a packed weight, in bfloat16."""
    return read_rows_of(matrix(data, kind, group_size, has_offsets), indices, in_features)
