"""Skinny GEMMs without a norm, gate or residual: few tokens times a large weight, as fast as the weight is read.

Up to 4 tokens and a small weight are multiplied and summed on the ordinary cores: a program reads a few rows of the
weight and waits only for memory. Everything else runs on the tensor cores with the weight as the left operand, because
its rows fill a tile and those of `x` do not. Where the weight's rows alone make too few programs, its columns are split
as well (split-K), and a second kernel sums the parts in a fixed order: the same bits every time.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.triton.gemm_tuning import REDUCE_BLOCK, SkinnyGemmConfig, choose_linear
from dispec.ops.triton.skinny_gemm import split_evenly
from dispec.ops.triton.tuning import describe


@triton.jit
@no_type_check
def gemv_kernel(
    output,
    x,
    weight,
    bias,
    num_tokens,
    N,
    K,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Compute BLOCK_N features of all tokens, without tensor cores. Grid (ceil(N / BLOCK_N),)."""
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    weights = weight + feature[:, None].to(tl.int64) * K + column[None, :]
    inputs = x + row[:, None] * x_stride + column[None, :]
    for first in range(0, K, BLOCK_K):
        inside = first + column[None, :] < K
        # Each weight is read once, so it may leave the cache first.
        tile = tl.load(
            weights + first, mask=(feature[:, None] < N) & inside, other=0.0, eviction_policy="evict_first"
        ).to(tl.float32)
        part = tl.load(inputs + first, mask=(row[:, None] < num_tokens) & inside, other=0.0).to(tl.float32)
        accumulator += tile[None, :, :] * part[:, None, :]
    result = tl.sum(accumulator, 2)
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=feature < N, other=0.0).to(tl.float32)[None, :]
    mask = (row[:, None] < num_tokens) & (feature[None, :] < N)
    tl.store(output + row[:, None] * N + feature[None, :], result.to(output.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def split_k_kernel(
    output,
    x,
    weight,
    bias,
    num_tokens,
    N,
    K,
    x_stride,
    tiles_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Compute BLOCK_N features of all tokens over one split of the columns. Grid (ceil(N / BLOCK_N), splits).

    output: [T, N] in the type of x, or with SPLIT [splits, T, N] in float32, without the bias.
    """
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    accumulator = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    weights = weight + feature[:, None].to(tl.int64) * K + column[None, :]
    inputs = x + row[:, None] * x_stride + column[None, :]
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(K, BLOCK_K))):
        at = tile * BLOCK_K
        of_weight = feature[:, None] < N
        of_input = row[:, None] < num_tokens
        if not EVEN_K:
            of_weight &= at + column[None, :] < K
            of_input &= at + column[None, :] < K
        left = tl.load(weights + at, mask=of_weight, other=0.0, eviction_policy="evict_first")
        right = tl.load(inputs + at, mask=of_input, other=0.0)
        accumulator = tl.dot(left, tl.trans(right), accumulator, input_precision="ieee")
    mask = (row[None, :] < num_tokens) & (feature[:, None] < N)
    index = row[None, :] * N + feature[:, None]
    if SPLIT:
        tl.store(output + split.to(tl.int64) * num_tokens * N + index, accumulator, mask=mask)
    else:
        if HAS_BIAS:
            accumulator += tl.load(bias + feature, mask=feature < N, other=0.0).to(tl.float32)[:, None]
        tl.store(output + index, accumulator.to(output.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def reduce_splits_kernel(
    output, partial, bias, size, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Sum the splits of BLOCK elements of the output. Grid (ceil(T * N / BLOCK),)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    result = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        result += tl.load(partial + split * size + index, mask=inside, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias + index % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + index, result.to(output.dtype.element_ty), mask=inside)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: SkinnyGemmConfig | None = None) -> Tensor:
    """Return `x @ weight.T + bias`, by torch where no kernel here was measured to be faster.

    x: [T, K]; weight: [N, K]; bias: [N] or None; all bfloat16 or float16. Returns [T, N], contiguous, summed in
    float32. config: replaces the table's choice in tests and tuning.
    """
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    if config is None:
        config = choose_linear(describe(x.device), num_tokens, out_features, in_features)
    if config is None or num_tokens == 0 or x.stride(1) != 1 or not weight.is_contiguous():
        return torch.nn.functional.linear(x, weight, bias)
    output = torch.empty((num_tokens, out_features), dtype=x.dtype, device=x.device)
    grid, block_m = triton.cdiv(out_features, config.block_n), triton.next_power_of_2(num_tokens)
    has_bias = bias is not None
    bias = weight if bias is None else bias
    arguments = (x, weight, bias, num_tokens, out_features, in_features, x.stride(0))
    blocks = {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "HAS_BIAS": has_bias}
    if config.splits == 0:
        gemv_kernel[(grid,)](output, *arguments, BLOCK_M=block_m, **blocks, num_warps=config.num_warps)
        return output
    tiles_per_split, splits = split_evenly(in_features, config)
    partial = output
    if splits > 1:
        partial = torch.empty((splits, num_tokens, out_features), dtype=torch.float32, device=x.device)
    split_k_kernel[(grid, splits)](
        partial,
        *arguments,
        tiles_per_split,
        BLOCK_M=max(block_m, 16),
        **blocks,
        EVEN_K=in_features % config.block_k == 0,
        SPLIT=splits > 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        size, options = num_tokens * out_features, {"BLOCK": REDUCE_BLOCK, "HAS_BIAS": has_bias, "num_warps": 2}
        grid = triton.cdiv(size, REDUCE_BLOCK)
        reduce_splits_kernel[(grid,)](output, partial, bias, size, out_features, SPLITS=splits, **options)
    return output
