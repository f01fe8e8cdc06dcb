"""A product of few rows that is added to the residual, or whose rows are normed first, in one kernel."""

import functools
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.norm import Norm
from dispec.ops.triton.products import dotted, launch_options, product
from dispec.ops.triton.tuning import FewRowsConfig

# Counters of a device, one for each block of features: 64 features a block are enough for 262144.
MAX_ARRIVALS = 4096


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def add_kernel(
    output,
    partial,
    arrivals,
    x,
    weight,
    bias,
    norm,
    rows,
    N,
    x_stride,
    eps,
    tiles_per_split,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """`norm(x) @ weight.T + bias`, with ADDS added to what is in `output`.

    One program: BLOCK_N features of all rows over one split of the columns.
    Grid (ceil(N / BLOCK_N), SPLITS). Where the columns are split, each program leaves its part in `partial`
    [SPLITS, T, N], float32, and the last of a block of features to arrive, by the counter in `arrivals` (zero before),
    adds the parts in their order: the same bits whichever is last.
    """
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    is_feature = feature < N
    mask = (row[:, None] < rows) & is_feature[None, :]
    if SPLITS > 1:
        split = tl.program_id(1)
        first = split * tiles_per_split
        last = tl.minimum(first + tiles_per_split, (K + BLOCK_K - 1) // BLOCK_K)
        part = dotted(
            weight, feature, is_feature, x, x_stride, rows, norm, eps, first, last,
            K, BLOCK_M, BLOCK_N, BLOCK_K, NORM,
        )  # fmt: skip
        at = row[:, None] * N + feature[None, :]
        tl.store(partial + split * rows * N + at, part, mask=mask)
        tl.debug_barrier()  # every thread's part is stored before one of them tells so
        arrived = tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel")
        if arrived != SPLITS - 1:
            return
        tl.store(arrivals + tl.program_id(0), 0)  # as it was found
        result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for index in tl.static_range(SPLITS):
            result += tl.load(partial + index * rows * N + at, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        result = product(
            weight, feature, is_feature, x, x_stride, rows, norm, eps,
            K, BLOCK_M, BLOCK_N, BLOCK_K, TENSOR_CORES, NORM,
        )  # fmt: skip
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    to = output + row[:, None] * N + feature[None, :]
    if ADDS:
        result += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, result.to(output.dtype.element_ty), mask=mask)


@functools.cache
def arrivals(device: torch.device) -> Tensor:
    """Return the device's counters of split products, [MAX_ARRIVALS] int32, which are zero between kernels.

    They outlive every CUDA graph that uses them, so they must not be allocated while one is recorded.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("ops.allocate_workspaces(device) must be called before a CUDA graph is recorded")
    return torch.zeros(MAX_ARRIVALS, dtype=torch.int32, device=device)


def split_evenly(columns: int, config: FewRowsConfig) -> tuple[int, int]:
    """(tiles of each split, splits): no more splits than have a tile."""
    tiles = triton.cdiv(columns, config.block_k)
    tiles_per_split = triton.cdiv(tiles, max(config.splits, 1))
    return tiles_per_split, triton.cdiv(tiles, tiles_per_split) if config.splits else 1


def add_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None,
    config: FewRowsConfig,
) -> Tensor:
    """`norm(x) @ weight.T + bias`, added in place to `residual` if there is one; rounded once.

    x: [T, K], contiguous in its rows; weight: [N, K] and residual: [T, N], contiguous; bias: [N]. A norm only without
    splits. Products whose columns are split share their counters: none of them may run beside another.
    """
    (rows, columns), features = x.shape, weight.shape[0]
    output = residual
    if output is None:
        output = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    tiles_per_split, splits = split_evenly(columns, config)
    assert norm is None or splits == 1
    grid = triton.cdiv(features, config.block_n)
    partial = output
    if splits > 1:
        partial = torch.empty((splits, rows, features), dtype=torch.float32, device=x.device)
        assert grid <= MAX_ARRIVALS
    add_kernel[(grid, splits)](
        output,
        partial,
        arrivals(x.device) if splits > 1 else output,
        x,
        weight,
        weight if bias is None else bias,
        weight if norm is None else norm.weight,
        rows,
        features,
        x.stride(0),
        0.0 if norm is None else norm.eps,
        tiles_per_split,
        K=columns,
        SPLITS=splits,
        HAS_BIAS=bias is not None,
        ADDS=residual is not None,
        **launch_options(x, config, norm is not None),
    )
    return output
