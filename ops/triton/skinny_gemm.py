"""Inner loops of skinny GEMMs: few tokens times a large weight, which take as long as reading the weight.

Both loops stream a tile of weight rows past all tokens and return a float32 block [BLOCK_M, BLOCK_N]. An RMS norm of x
needs no pass of its own: the norm's weight multiplies x as it is loaded, and the divisor, computed beside the products,
multiplies the sums at the end. With NORM "before", x is divided first, in a pass of its own: float16 overflows on x
times a norm weight without the divisor.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.triton.gemm_tuning import PREFETCHED_BYTES, SkinnyGemmConfig
from dispec.ops.triton.overlap import overlap_options


@triton.jit
@no_type_check
def _load_weights(pointers, is_feature, column, at, K: tl.constexpr):
    # Each weight is read once, so it may leave the cache first.
    mask = is_feature[:, None] & (at + column[None, :] < K)
    return tl.load(pointers + at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
@no_type_check
def _add_products(total, squares, tile, scale, pointers, is_inside, NORM: tl.constexpr):
    part = tl.load(pointers, mask=is_inside, other=0.0).to(tl.float32)
    if NORM != "none":
        squares += part * part
        part *= scale
    return total + tile * part, squares


@triton.jit
@no_type_check
def _sum_products(total, squares, eps, K: tl.constexpr, NORM: tl.constexpr):
    result = tl.sum(total, 1)
    if NORM != "none":
        result *= tl.math.rsqrt(tl.sum(squares, 1) / K + eps)
    return result


@triton.jit
@no_type_check
def multiply_on_cuda_cores(
    weight,
    feature,
    is_feature,
    x,
    x_stride,
    num_tokens,
    norm,
    eps,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    """Multiply up to 4 tokens with weight rows `feature`, without tensor cores.

    Each token has an accumulator of its own: with one accumulator of three dimensions, the tiles of x and of the weight
    would change their layout through shared memory in every iteration. The next weight tile is loaded one iteration
    ahead.
    """
    tl.static_assert(BLOCK_M <= 4)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    pointers = weight + feature[:, None].to(tl.int64) * K + column[None, :]
    tile = _load_weights(pointers, is_feature, column, 0, K)
    total0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares0 = tl.zeros([1, BLOCK_K], tl.float32)
    total1, total2, total3 = total0, total0, total0
    squares1, squares2, squares3 = squares0, squares0, squares0
    inputs = x + column[None, :]
    for at in range(0, K, BLOCK_K):
        following = _load_weights(pointers, is_feature, column, at + BLOCK_K, K)
        inside = at + column[None, :] < K
        wide = tile.to(tl.float32)
        scale = tl.full([1, 1], 1.0, tl.float32)
        if NORM != "none":
            scale = tl.load(norm + at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total0, squares0 = _add_products(total0, squares0, wide, scale, inputs + at, inside, NORM)
        if BLOCK_M > 1:
            is_token = at + column[None, :] < tl.where(num_tokens > 1, K, 0)
            total1, squares1 = _add_products(total1, squares1, wide, scale, inputs + x_stride + at, is_token, NORM)
        if BLOCK_M > 2:
            is_token = at + column[None, :] < tl.where(num_tokens > 2, K, 0)
            total2, squares2 = _add_products(total2, squares2, wide, scale, inputs + 2 * x_stride + at, is_token, NORM)
            is_token = at + column[None, :] < tl.where(num_tokens > 3, K, 0)
            total3, squares3 = _add_products(total3, squares3, wide, scale, inputs + 3 * x_stride + at, is_token, NORM)
        tile = following
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + _sum_products(total0, squares0, eps, K, NORM)[None, :]
    if BLOCK_M > 1:
        result = tl.where(row[:, None] == 1, _sum_products(total1, squares1, eps, K, NORM)[None, :], result)
    if BLOCK_M > 2:
        result = tl.where(row[:, None] == 2, _sum_products(total2, squares2, eps, K, NORM)[None, :], result)
        result = tl.where(row[:, None] == 3, _sum_products(total3, squares3, eps, K, NORM)[None, :], result)
    return result


@triton.jit
@no_type_check
def _inverse_rms(inputs, is_token, column, eps, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for at in range(0, K, BLOCK_K):
        part = tl.load(inputs + at, mask=is_token[:, None] & (at + column[None, :] < K), other=0.0).to(tl.float32)
        squares += part * part
    return tl.math.rsqrt(tl.sum(squares, 1) / K + eps)


@triton.jit
@no_type_check
def _dot_tile(
    accumulator, squares, left, inputs, norm, inverse, is_token, column, at, K: tl.constexpr, NORM: tl.constexpr
):
    right = tl.load(inputs + at, mask=is_token[:, None] & (at + column[None, :] < K), other=0.0)
    if NORM != "none":
        scale = tl.load(norm + at + column, mask=at + column < K, other=0.0).to(tl.float32)
        wide = right.to(tl.float32)
        if NORM == "before":
            wide = (wide * inverse[:, None]).to(right.dtype).to(tl.float32)
        else:
            squares += wide * wide
        right = (wide * scale[None, :]).to(right.dtype)
    return tl.dot(left, tl.trans(right), accumulator, input_precision="ieee"), squares


@triton.jit
@no_type_check
def multiply_on_tensor_cores(
    weight,
    feature,
    is_feature,
    x,
    x_stride,
    num_tokens,
    norm,
    eps,
    first_tile,
    last_tile,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    """Multiply over columns of tiles `first_tile : last_tile`, at least one, on the tensor cores.

    The weight is the left operand: its rows fill a tile, and those of x do not.
    """
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    is_token = row < num_tokens
    pointers = weight + feature[:, None].to(tl.int64) * K + column[None, :]
    inputs = x + row[:, None].to(tl.int64) * x_stride + column[None, :]
    accumulator = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    inverse = tl.zeros([BLOCK_M], tl.float32)
    if NORM == "before":
        inverse = _inverse_rms(inputs, is_token, column, eps, K, BLOCK_M, BLOCK_K)
    for tile in range(first_tile, last_tile):
        at = tile * BLOCK_K
        left = _load_weights(pointers, is_feature, column, at, K)
        accumulator, squares = _dot_tile(
            accumulator, squares, left, inputs, norm, inverse, is_token, column, at, K, NORM
        )  # fmt: skip
    if NORM == "after":
        accumulator *= tl.math.rsqrt(tl.sum(squares, 1) / K + eps)[None, :]
    return tl.trans(accumulator)


@triton.jit
@no_type_check
def skinny_gemm(
    weight,
    feature,
    is_feature,
    x,
    x_stride,
    num_tokens,
    norm,
    eps,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    NORM: tl.constexpr,
):
    """Return `norm(x) @ weight[feature].T` over all K columns, float32 [BLOCK_M, BLOCK_N]; 0 where not `is_feature`."""
    if TENSOR_CORES:
        tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
        result = multiply_on_tensor_cores(
            weight, feature, is_feature, x, x_stride, num_tokens, norm, eps, 0, tiles,
            K, BLOCK_M, BLOCK_N, BLOCK_K, NORM,
        )  # fmt: skip
    else:
        result = multiply_on_cuda_cores(
            weight, feature, is_feature, x, x_stride, num_tokens, norm, eps, K, BLOCK_M, BLOCK_N, BLOCK_K, NORM
        )
    return result


def split_evenly(in_features: int, config: SkinnyGemmConfig) -> tuple[int, int]:
    """Return (tiles of each split, splits) of the columns: no more splits than have a tile."""
    tiles = triton.cdiv(in_features, config.block_k)
    tiles_per_split = triton.cdiv(tiles, max(config.splits, 1))
    return tiles_per_split, triton.cdiv(tiles, tiles_per_split) if config.splits else 1


def launch_options(x: Tensor, config: SkinnyGemmConfig, has_norm: bool) -> dict[str, int | bool | str]:
    """Return the constants of `skinny_gemm` and the launch options for x [T, K]."""
    on_tensor_cores = config.splits > 0
    norm = "none"
    if has_norm:
        norm = "before" if on_tensor_cores and x.dtype is torch.float16 else "after"
    block_m = triton.next_power_of_2(x.shape[0])
    return {
        "BLOCK_M": max(block_m, 16) if on_tensor_cores else block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "TENSOR_CORES": on_tensor_cores,
        "NORM": norm,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "PREFETCHED": PREFETCHED_BYTES,
        **overlap_options(x),
    }
