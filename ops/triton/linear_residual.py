"""A skinny GEMM with the norm before it, the bias and the residual connection, in one kernel."""

import functools
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.norm import Norm
from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig
from dispec.ops.triton.overlap import launch_next, prefetch_and_wait
from dispec.ops.triton.skinny_gemm import launch_options, multiply_on_tensor_cores, skinny_gemm, split_evenly

# Counters of a device, one for each block of output features: at 64 a block, enough for 262,144.
MAX_COUNTERS = 4096


@triton.jit(do_not_specialize=["num_tokens"])
@no_type_check
def linear_residual_kernel(
    output,
    partial,
    counters,
    x,
    weight,
    bias,
    norm,
    num_tokens,
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
    OVERLAPS: tl.constexpr,
    PREFETCHED: tl.constexpr,
):
    """Write `norm(x) @ weight.T + bias` to `output`, or with ADDS add it to `output`.

    Computes BLOCK_N features of all tokens over one split of the columns. Grid (ceil(N / BLOCK_N), SPLITS). With
    several splits each program stores its part in `partial` [SPLITS, T, N], float32. The last program of a block of
    features to finish, found by `counters` (zero before and after), sums the parts in their order, so that the bits do
    not depend on which program is last.
    """
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    is_feature = feature < N
    mask = (row[:, None] < num_tokens) & is_feature[None, :]
    split = tl.program_id(1)
    first = split * tiles_per_split
    prefetch_and_wait(weight, feature, is_feature, first * BLOCK_K, K, OVERLAPS, PREFETCHED)
    if SPLITS > 1:
        last = tl.minimum(first + tiles_per_split, (K + BLOCK_K - 1) // BLOCK_K)
        part = multiply_on_tensor_cores(
            weight, feature, is_feature, x, x_stride, num_tokens, norm, eps, first, last,
            K, BLOCK_M, BLOCK_N, BLOCK_K, NORM,
        )  # fmt: skip
        launch_next(OVERLAPS)
        at = row[:, None] * N + feature[None, :]
        tl.store(partial + split * num_tokens * N + at, part, mask=mask)
        tl.debug_barrier()  # all threads store their part before one of them counts it
        finished = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel")
        if finished != SPLITS - 1:
            return
        tl.store(counters + tl.program_id(0), 0)
        result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for index in tl.static_range(SPLITS):
            result += tl.load(partial + index * num_tokens * N + at, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        result = skinny_gemm(
            weight, feature, is_feature, x, x_stride, num_tokens, norm, eps,
            K, BLOCK_M, BLOCK_N, BLOCK_K, TENSOR_CORES, NORM,
        )  # fmt: skip
        launch_next(OVERLAPS)
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    to = output + row[:, None] * N + feature[None, :]
    if ADDS:
        result += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, result.to(output.dtype.element_ty), mask=mask)


@functools.cache
def split_counters(device: torch.device) -> Tensor:
    """Return the device's counters of finished splits, [MAX_COUNTERS] int32, which are zero between kernels.

    They outlive every CUDA graph that uses them. Raises RuntimeError if they would be allocated during a recording.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("ops.allocate_workspaces(device) must be called before a CUDA graph is recorded")
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)


def norm_linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None,
    config: SkinnyGemmConfig,
) -> Tensor:
    """Return `norm(x) @ weight.T + bias`, added in place to `residual` if there is one; rounded once.

    x: [T, K], contiguous in its rows; weight: [N, K] and residual: [T, N], contiguous; bias: [N]. A norm needs all
    columns in one split. Launches with several splits share their counters and must not run concurrently.
    """
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    output = residual
    if output is None:
        output = torch.empty((num_tokens, out_features), dtype=x.dtype, device=x.device)
    tiles_per_split, splits = split_evenly(in_features, config)
    assert norm is None or splits == 1
    grid = triton.cdiv(out_features, config.block_n)
    partial = output
    if splits > 1:
        partial = torch.empty((splits, num_tokens, out_features), dtype=torch.float32, device=x.device)
        assert grid <= MAX_COUNTERS
    linear_residual_kernel[(grid, splits)](
        output,
        partial,
        split_counters(x.device) if splits > 1 else output,
        x,
        weight,
        weight if bias is None else bias,
        weight if norm is None else norm.weight,
        num_tokens,
        out_features,
        x.stride(0),
        0.0 if norm is None else norm.eps,
        tiles_per_split,
        K=in_features,
        SPLITS=splits,
        HAS_BIAS=bias is not None,
        ADDS=residual is not None,
        **launch_options(x, config, norm is not None),
    )
    return output
