"""A GEMM of many tokens with the gated activation after it, in one kernel that loads tiles by the copy engine (TMA).

The gate and the up half of a tile's features are accumulated beside each other, so the 2 F features before the
activation are never written: for Qwen2.5-1.5B and 2,048 tokens that saves 73 MB of writes and as many reads a layer.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dispec.ops.triton.gemm_tuning import GatedGemmConfig


@triton.jit(do_not_specialize=["num_tokens"])
@no_type_check
def gated_gemm_kernel(
    output,
    x,
    weight,
    num_tokens,
    F,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Write `silu(gate) * up` of the two halves of `x @ weight.T`: tiles of BLOCK_M tokens and BLOCK_N features.

    Grid (programs,), each of which computes every programs-th tile. Tiles are numbered through GROUP_M rows of tiles
    at a time, so that those that run at once share their inputs in the L2 cache. output, x, weight: descriptors of
    [T, F], [T, K] and [2 F, K].
    """
    rows, columns = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        first_row = tile // (GROUP_M * columns) * GROUP_M
        group = tl.minimum(rows - first_row, GROUP_M)
        in_group = tile % (GROUP_M * columns)
        token = (first_row + in_group % group) * BLOCK_M
        feature = in_group // group * BLOCK_N
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            tokens = x.load([token, k])
            gate = tl.dot(tokens, weight.load([feature, k]).T, gate)
            up = tl.dot(tokens, weight.load([F + feature, k]).T, up)
        result = gate / (1.0 + tl.exp(-gate)) * up
        output.store([token, feature], result.to(output.dtype))


def gated_gemm(x: Tensor, weight: Tensor, config: GatedGemmConfig) -> Tensor:
    """Return `silu(gate) * up` [T, F] of the halves gate and up of `x @ weight.T` [T, 2 F]; rounded once.

    x: [T, K]; weight: [2 F, K]; both contiguous. K and F are multiples of 8.
    """
    (num_tokens, in_features), intermediate = x.shape, weight.shape[0] // 2
    output = torch.empty((num_tokens, intermediate), dtype=x.dtype, device=x.device)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    tiles = triton.cdiv(num_tokens, block_m) * triton.cdiv(intermediate, block_n)
    gated_gemm_kernel[(min(tiles, config.programs),)](
        TensorDescriptor.from_tensor(output, [block_m, block_n]),
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, [block_n, block_k]),
        num_tokens,
        intermediate,
        K=in_features,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return output
