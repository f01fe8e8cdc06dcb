"""GEMMs with weights packed into tiles of 32 output features: see linear.cpp."""

import ctypes

import torch
from jaxtyping import BFloat16
from torch import Tensor

from dispec.ops.cpu.library import Matrix, WeightKind, address, int32, kernel
from dispec.ops.huge_pages import on_huge_pages

TILE = 32


def pack(
    weight: BFloat16[Tensor, "N K"], out: BFloat16[Tensor, "tiles pairs 32 2"] | None = None
) -> BFloat16[Tensor, "tiles pairs 32 2"]:
    """Return the weight in tiles: 32 rows side by side, in pairs of neighbouring elements, padded with zeros."""
    out_features, in_features = weight.shape
    weight = weight.contiguous()
    packed = out
    if packed is None:
        packed = on_huge_pages(weight.new_empty(-(-out_features // TILE), -(-in_features // 2), TILE, 2))
    kernel("pack")(weight.data_ptr(), packed.data_ptr(), out_features, in_features)
    return packed


def linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    is_gated: bool,
) -> Tensor:
    """Compute `ops.linear` with tiles of bf16: [T, M]. The bits of a row depend on that row alone."""
    matrix = Matrix(packed.data_ptr(), WeightKind.BFLOAT16)
    return multiply(x, matrix, out_features, bias, norm, eps, residual, is_gated)


def multiply(
    x: Tensor,
    weight: Matrix,
    out_features: int,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    is_gated: bool,
) -> Tensor:
    """Compute `ops.linear` with a weight in tiles. If `is_gated`, out_features is a multiple of 64."""
    num_tokens, in_features = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    if residual is not None:
        residual = residual.contiguous()
    output = torch.empty(num_tokens, out_features // 2 if is_gated else out_features, dtype=torch.bfloat16)
    kernel("linear")(
        x.data_ptr(),
        x.stride(0),
        address(norm),
        eps,
        ctypes.byref(weight),
        address(bias),
        address(residual),
        output.data_ptr(),
        num_tokens,
        out_features,
        in_features,
        is_gated,
    )
    return output


def unpack_rows(packed: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Return rows [T, in_features] of a packed bf16 weight."""
    return read_rows(Matrix(packed.data_ptr(), WeightKind.BFLOAT16), indices, in_features)


def read_rows(weight: Matrix, indices: Tensor, in_features: int) -> Tensor:
    """Return rows [T, in_features] of a weight, in bfloat16."""
    indices = int32(indices)
    output = torch.empty(len(indices), in_features, dtype=torch.bfloat16)
    kernel("read_rows")(ctypes.byref(weight), indices.data_ptr(), len(indices), in_features, output.data_ptr())
    return output
