"""RMS norm and gated activation as kernels of their own, around torch's GEMM."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.norm import Norm
from dispec.ops.triton.overlap import launch_next, overlap_options, wait


@triton.jit
@no_type_check
def rms_norm_kernel(output, x, weight, x_stride, eps, E: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """Norm one token of x [T, E]. Grid (T,)."""
    launch_next(OVERLAPS)
    wait(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < E
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    normed = (wide * tl.math.rsqrt(tl.sum(wide * wide, 0) / E + eps)).to(output.dtype.element_ty).to(tl.float32)
    normed *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * E + column, normed.to(output.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def silu_and_mul_kernel(output, gate_up, F, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """Gate BLOCK features of one token of gate_up [T, 2 F]. Grid (T, ceil(F / BLOCK))."""
    launch_next(OVERLAPS)
    wait(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < F
    gate = tl.load(gate_up + row * 2 * F + feature, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + feature, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(output + row * F + feature, result.to(output.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """Return `ops.rms_norm(x, norm)` for x [T, E], contiguous in its rows."""
    num_tokens, hidden = x.shape
    output = torch.empty((num_tokens, hidden), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    rms_norm_kernel[(num_tokens,)](
        output,
        x,
        norm.weight,
        x.stride(0),
        norm.eps,
        E=hidden,
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
        **overlap_options(x),
    )
    return output


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up` of the two halves of each row. gate_up: [T, 2 F], contiguous. Returns [T, F]."""
    num_tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty((num_tokens, intermediate), dtype=gate_up.dtype, device=gate_up.device)
    block = min(triton.next_power_of_2(intermediate), 1024)
    silu_and_mul_kernel[(num_tokens, triton.cdiv(intermediate, block))](
        output, gate_up, intermediate, BLOCK=block, num_warps=4, **overlap_options(output)
    )
    return output
