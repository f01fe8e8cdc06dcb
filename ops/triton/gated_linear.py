"""A skinny GEMM with the norm before it and the gated activation after it, in one kernel."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.norm import Norm
from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig
from dispec.ops.triton.overlap import launch_next, prefetch_and_wait
from dispec.ops.triton.skinny_gemm import launch_options, skinny_gemm


@triton.jit(do_not_specialize=["num_tokens"])
@no_type_check
def gated_linear_kernel(
    output,
    x,
    weight,
    norm,
    num_tokens,
    F,
    x_stride,
    eps,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    NORM: tl.constexpr,
    OVERLAPS: tl.constexpr,
    PREFETCHED: tl.constexpr,
):
    """Write `silu(gate) * up` of the two halves of `norm(x) @ weight.T`: BLOCK_N / 2 features of all tokens.

    Grid (ceil(F / (BLOCK_N / 2)),). Rows of the gate and of the up half of the weight [2 F, K] alternate in a tile.
    """
    lane = tl.arange(0, BLOCK_N)
    pair = tl.program_id(0) * (BLOCK_N // 2) + lane // 2
    row = tl.arange(0, BLOCK_M)
    prefetch_and_wait(weight, lane % 2 * F + pair, pair < F, 0, K, OVERLAPS, PREFETCHED)
    result = skinny_gemm(
        weight, lane % 2 * F + pair, pair < F, x, x_stride, num_tokens, norm, eps,
        K, BLOCK_M, BLOCK_N, BLOCK_K, TENSOR_CORES, NORM,
    )  # fmt: skip
    launch_next(OVERLAPS)
    gate, up = tl.split(tl.reshape(result, [BLOCK_M, BLOCK_N // 2, 2]))
    result = gate / (1.0 + tl.exp(-gate)) * up
    feature = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    mask = (row[:, None] < num_tokens) & (feature[None, :] < F)
    tl.store(output + row[:, None] * F + feature[None, :], result.to(output.dtype.element_ty), mask=mask)


def gated_linear(x: Tensor, weight: Tensor, norm: Norm | None, config: SkinnyGemmConfig) -> Tensor:
    """Return `silu(gate) * up` [T, F] of the halves gate and up of `norm(x) @ weight.T` [T, 2 F]; rounded once.

    x: [T, K], contiguous in its rows; weight: [2 F, K], contiguous.
    """
    (num_tokens, in_features), intermediate = x.shape, weight.shape[0] // 2
    output = torch.empty((num_tokens, intermediate), dtype=x.dtype, device=x.device)
    gated_linear_kernel[(triton.cdiv(intermediate, config.block_n // 2),)](
        output,
        x,
        weight,
        weight if norm is None else norm.weight,
        num_tokens,
        intermediate,
        x.stride(0),
        0.0 if norm is None else norm.eps,
        K=in_features,
        **launch_options(x, config, norm is not None),
    )
    return output
