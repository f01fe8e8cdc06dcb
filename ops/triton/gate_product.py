"""A norm, a product of few rows and the gate that follows it, in one kernel."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.norm import Norm
from dispec.ops.triton.products import launch_options, product
from dispec.ops.triton.tuning import FewRowsConfig


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def gate_kernel(
    output,
    x,
    weight,
    norm,
    rows,
    F,
    x_stride,
    eps,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    NORM: tl.constexpr,
):
    """`silu(gate) * up` of the two halves of `norm(x) @ weight.T`. One program: BLOCK_N / 2 features of all rows.

    Grid (ceil(F / (BLOCK_N / 2)),). Rows of the weight [2 F, K] are taken in turns from the gate and from up.
    """
    lane = tl.arange(0, BLOCK_N)
    pair = tl.program_id(0) * (BLOCK_N // 2) + lane // 2
    row = tl.arange(0, BLOCK_M)
    result = product(
        weight, lane % 2 * F + pair, pair < F, x, x_stride, rows, norm, eps,
        K, BLOCK_M, BLOCK_N, BLOCK_K, TENSOR_CORES, NORM,
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(result, [BLOCK_M, BLOCK_N // 2, 2]))
    result = gate / (1.0 + tl.exp(-gate)) * up
    feature = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    mask = (row[:, None] < rows) & (feature[None, :] < F)
    tl.store(output + row[:, None] * F + feature[None, :], result.to(output.dtype.element_ty), mask=mask)


def gate_product(x: Tensor, weight: Tensor, norm: Norm | None, config: FewRowsConfig) -> Tensor:
    """`silu(gate) * up` where gate and up, side by side, are `norm(x) @ weight.T`; rounded once. [T, F].

    x: [T, K], contiguous in its rows; weight: [2 F, K], contiguous.
    """
    (rows, columns), intermediate = x.shape, weight.shape[0] // 2
    output = torch.empty((rows, intermediate), dtype=x.dtype, device=x.device)
    gate_kernel[(triton.cdiv(intermediate, config.block_n // 2),)](
        output,
        x,
        weight,
        weight if norm is None else norm.weight,
        rows,
        intermediate,
        x.stride(0),
        0.0 if norm is None else norm.eps,
        K=columns,
        **launch_options(x, config, norm is not None),
    )
    return output
