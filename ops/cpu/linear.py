"""GEMMs with weights packed into tiles of 32 output features, in bf16 or int8: see linear.cpp."""

import torch
from jaxtyping import BFloat16, Int8
from torch import Tensor

from dispec.ops.cpu.library import address, int32, kernel

TILE = 32

_QUANTIZED_ROWS = 128 * TILE  # at a time, which bounds the temporary memory


def pack(
    weight: BFloat16[Tensor, "N K"], out: BFloat16[Tensor, "tiles pairs 32 2"] | None = None
) -> BFloat16[Tensor, "tiles pairs 32 2"]:
    """Return the weight in tiles: 32 rows side by side, in pairs of neighbouring elements, padded with zeros."""
    out_features, in_features = weight.shape
    weight = weight.contiguous()
    packed = weight.new_empty(-(-out_features // TILE), -(-in_features // 2), TILE, 2) if out is None else out
    kernel("pack")(weight.data_ptr(), packed.data_ptr(), out_features, in_features)
    return packed


def pack_int8(
    weight: BFloat16[Tensor, "N K"], out: Int8[Tensor, "tiles elements 32"] | None = None
) -> Int8[Tensor, "tiles elements 32"]:
    """Return the weight in tiles of integers from -127 to 127, with a factor for each row.

    Half the bytes, and so half the time of a GEMM of few tokens. A row's factor is its largest magnitude over 127. A
    tile has an even number of columns of elements, followed by the float32 factors; missing rows and columns are zeros.
    """
    out_features, in_features = weight.shape
    elements = in_features + in_features % 2 + torch.float32.itemsize
    packed = torch.empty(-(-out_features // TILE), elements, TILE, dtype=torch.int8) if out is None else out
    for part, tiles in zip(weight.split(_QUANTIZED_ROWS), packed.split(_QUANTIZED_ROWS // TILE), strict=True):
        tiles.copy_(_int8_tiles(part))
    return packed


def _int8_tiles(weight: BFloat16[Tensor, "N K"]) -> Int8[Tensor, "tiles elements 32"]:
    out_features, in_features = weight.shape
    wide = torch.nn.functional.pad(weight.float(), (0, in_features % 2, 0, -out_features % TILE))
    factors = (wide.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (wide / factors[:, None]).round().to(torch.int8)
    tiles = numbers.unflatten(0, (-1, TILE)).transpose(1, 2)
    return torch.cat((tiles, factors.view(torch.int8).view(len(tiles), -1, TILE)), dim=1)


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
    """Compute `ops.linear`: [T, M]. The bits of a row depend on that row alone."""
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
        packed.data_ptr(),
        packed.dtype is torch.int8,
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
    indices = int32(indices)
    output = torch.empty(len(indices), in_features, dtype=torch.bfloat16)
    kernel("unpack_rows")(packed.data_ptr(), indices.data_ptr(), len(indices), in_features, output.data_ptr())
    return output
