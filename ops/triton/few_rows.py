"""Products of a few rows with a large weight, which take as long as it takes to read the weight.

Two kernels. Up to 4 rows against a small weight multiply and sum on the ordinary cores: a program reads a few rows of
the weight and has nothing to wait for but memory. Everything else goes through the tensor cores with the weight as the
left operand, because its rows fill a tile and those of `x` do not. Where the weight's rows alone make too few programs,
its columns are split as well, and a second kernel adds the parts in a fixed order: the same bits every time.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.triton.tuning import REDUCE_BLOCK, FewRowsConfig, choose_few_rows, describe


@triton.jit
@no_type_check
def sum_kernel(
    output,
    x,
    weight,
    bias,
    rows,
    N,
    K,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One program: BLOCK_N features of all rows, without tensor cores. Grid (ceil(N / BLOCK_N),)."""
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    weights = weight + feature[:, None].to(tl.int64) * K + column[None, :]
    inputs = x + row[:, None] * x_stride + column[None, :]
    for first in range(0, K, BLOCK_K):
        inside = first + column[None, :] < K
        # Each weight is read once: it need not displace anything from the cache.
        tile = tl.load(
            weights + first, mask=(feature[:, None] < N) & inside, other=0.0, eviction_policy="evict_first"
        ).to(tl.float32)
        part = tl.load(inputs + first, mask=(row[:, None] < rows) & inside, other=0.0).to(tl.float32)
        accumulator += tile[None, :, :] * part[:, None, :]
    result = tl.sum(accumulator, 2)
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=feature < N, other=0.0).to(tl.float32)[None, :]
    mask = (row[:, None] < rows) & (feature[None, :] < N)
    tl.store(output + row[:, None] * N + feature[None, :], result.to(output.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def dot_kernel(
    output,
    x,
    weight,
    bias,
    rows,
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
    """One program: BLOCK_N features of all rows over one split of the columns. Grid (ceil(N / BLOCK_N), splits).

    output is [T, N] in the type of x, or with SPLIT [splits, T, N] in float32, without the bias.
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
        of_input = row[:, None] < rows
        if not EVEN_K:
            of_weight &= at + column[None, :] < K
            of_input &= at + column[None, :] < K
        left = tl.load(weights + at, mask=of_weight, other=0.0, eviction_policy="evict_first")
        right = tl.load(inputs + at, mask=of_input, other=0.0)
        accumulator = tl.dot(left, tl.trans(right), accumulator, input_precision="ieee")
    mask = (row[None, :] < rows) & (feature[:, None] < N)
    index = row[None, :] * N + feature[:, None]
    if SPLIT:
        tl.store(output + split.to(tl.int64) * rows * N + index, accumulator, mask=mask)
    else:
        if HAS_BIAS:
            accumulator += tl.load(bias + feature, mask=feature < N, other=0.0).to(tl.float32)[:, None]
        tl.store(output + index, accumulator.to(output.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def reduce_kernel(output, partial, bias, size, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """One program: BLOCK elements of the output, as the sum of their parts. Grid (ceil(T * N / BLOCK),)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    result = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        result += tl.load(partial + split * size + index, mask=inside, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias + index % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + index, result.to(output.dtype.element_ty), mask=inside)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: FewRowsConfig | None = None) -> Tensor:
    """`x @ weight.T + bias`, by torch where no kernel of ours is known to be faster.

    x: [T, K]; weight: [N, K]; bias: [N] or None; all bfloat16 or float16. Returns [T, N], contiguous, summed in
    float32. `config` replaces what the table would choose, for tests and tuning.
    """
    rows, columns = x.shape
    features = weight.shape[0]
    if config is None:
        config = choose_few_rows(describe(x.device), rows, features, columns)
    if config is None or rows == 0 or x.stride(1) != 1 or not weight.is_contiguous():
        return torch.nn.functional.linear(x, weight, bias)
    output = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    grid = triton.cdiv(features, config.block_n)
    arguments = (x, weight, weight if bias is None else bias, rows, features, columns, x.stride(0))
    blocks = {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "HAS_BIAS": bias is not None}
    if config.splits == 0:
        sum_kernel[(grid,)](
            output, *arguments, BLOCK_M=triton.next_power_of_2(rows), **blocks, num_warps=config.num_warps
        )
        return output
    tiles = triton.cdiv(columns, config.block_k)
    tiles_per_split = triton.cdiv(tiles, config.splits)
    splits = triton.cdiv(tiles, tiles_per_split)
    target = output
    if splits > 1:
        target = torch.empty((splits, rows, features), dtype=torch.float32, device=x.device)
    dot_kernel[(grid, splits)](
        target,
        *arguments,
        tiles_per_split,
        BLOCK_M=max(triton.next_power_of_2(rows), 16),
        **blocks,
        EVEN_K=columns % config.block_k == 0,
        SPLIT=splits > 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        reduce_kernel[(triton.cdiv(rows * features, REDUCE_BLOCK),)](
            output,
            target,
            arguments[2],
            rows * features,
            features,
            SPLITS=splits,
            BLOCK=REDUCE_BLOCK,
            HAS_BIAS=bias is not None,
            num_warps=2,
        )
    return output
