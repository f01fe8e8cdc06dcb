"""Products with weights in tiles of 32 outputs, of bf16 or of 8 bits: see linear.cpp."""

import torch
from jaxtyping import BFloat16, Int8
from torch import Tensor

from dispec.ops.cpu.attention import int32
from dispec.ops.cpu.library import library

TILE = 32

_ROUNDED_AT_ONCE = 128 * TILE  # rows: what rounding takes beside the result is then small


def pack(
    weight: BFloat16[Tensor, "N K"], out: BFloat16[Tensor, "tiles pairs 32 2"] | None = None
) -> BFloat16[Tensor, "tiles pairs 32 2"]:
    """The weight in tiles: 32 rows side by side, two neighbouring elements of each together, padded with zeros."""
    kernels = library()
    assert kernels is not None
    rows, columns = weight.shape
    packed = weight.new_empty(-(-rows // TILE), -(-columns // 2), TILE, 2) if out is None else out
    kernels.dispec_pack(weight.contiguous().data_ptr(), packed.data_ptr(), rows, columns)
    return packed


def pack_8_bits(
    weight: BFloat16[Tensor, "N K"], out: Int8[Tensor, "tiles elements 32"] | None = None
) -> Int8[Tensor, "tiles elements 32"]:
    """The weight in tiles as whole numbers from -127 to 127, with a factor for each row: half the bytes, and with them
    half the time of a product of few rows.

    The largest magnitude of a row is 127 times its factor. The factors lie behind the tile's elements, which an odd
    number of columns is padded for; absent rows are zeros.
    """
    rows, columns = weight.shape
    elements = columns + columns % 2 + torch.float32.itemsize
    packed = torch.empty(-(-rows // TILE), elements, TILE, dtype=torch.int8) if out is None else out
    for part, tiles in zip(weight.split(_ROUNDED_AT_ONCE), packed.split(_ROUNDED_AT_ONCE // TILE), strict=True):
        tiles.copy_(_rounded_tiles(part))
    return packed


def _rounded_tiles(weight: BFloat16[Tensor, "N K"]) -> Int8[Tensor, "tiles elements 32"]:
    rows, columns = weight.shape
    wide = torch.nn.functional.pad(weight.float(), (0, columns % 2, 0, -rows % TILE))
    factors = (wide.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (wide / factors[:, None]).round().to(torch.int8)
    tiles = numbers.unflatten(0, (-1, TILE)).transpose(1, 2)
    return torch.cat((tiles, factors.view(torch.int8).view(len(tiles), -1, TILE)), dim=1)


def linear(
    x: Tensor,
    packed: Tensor,
    features: int,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    is_gated: bool,
) -> Tensor:
    """As `ops.linear`, [T, features] or half of that. A row's result depends on that row alone, to the last bit."""
    kernels = library()
    assert kernels is not None
    tokens, size = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    if residual is not None:
        residual = residual.contiguous()
    output = torch.empty(tokens, features // 2 if is_gated else features, dtype=torch.bfloat16)
    kernels.dispec_linear(
        x.data_ptr(),
        x.stride(0),
        None if norm is None else norm.data_ptr(),
        eps,
        packed.data_ptr(),
        packed.dtype is torch.int8,
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        output.data_ptr(),
        tokens,
        features,
        size,
        is_gated,
    )
    return output


def rows(packed: Tensor, indices: Tensor, size: int) -> Tensor:
    """Rows of the weight [N, size] that was packed, [T, size]."""
    kernels = library()
    assert kernels is not None
    indices = int32(indices)
    output = torch.empty(len(indices), size, dtype=torch.bfloat16)
    kernels.dispec_unpack_rows(packed.data_ptr(), indices.data_ptr(), len(indices), size, output.data_ptr())
    return output
