"""The norm before a product and the gate after it, as kernels of their own around torch's product."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.norm import Norm


@triton.jit
@no_type_check
def norm_kernel(output, x, weight, x_stride, eps, E: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a row of x. Grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < E
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    normed = (wide * tl.math.rsqrt(tl.sum(wide * wide, 0) / E + eps)).to(output.dtype.element_ty).to(tl.float32)
    normed *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * E + column, normed.to(output.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def gate_halves_kernel(output, gate_up, F, BLOCK: tl.constexpr):
    """One program: BLOCK features of a row. Grid (T, ceil(F / BLOCK))."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < F
    gate = tl.load(gate_up + row * 2 * F + feature, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + feature, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(output + row * F + feature, result.to(output.dtype.element_ty), mask=inside)


def norm_rows(x: Tensor, norm: Norm) -> Tensor:
    """Return `ops.rms_norm(x, norm)` for x [T, E], contiguous in its rows."""
    rows, hidden = x.shape
    output = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    norm_kernel[(rows,)](
        output,
        x,
        norm.weight,
        x.stride(0),
        norm.eps,
        E=hidden,
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
    )
    return output


def gate_halves(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up` of the two halves of each row. gate_up: [T, 2 F], contiguous. Returns [T, F]."""
    rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty((rows, intermediate), dtype=gate_up.dtype, device=gate_up.device)
    block = min(triton.next_power_of_2(intermediate), 1024)
    gate_halves_kernel[(rows, triton.cdiv(intermediate, block))](
        output, gate_up, intermediate, BLOCK=block, num_warps=4
    )
    return output
