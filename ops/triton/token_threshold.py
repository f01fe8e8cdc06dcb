"""The top-k and top-p threshold of each row, by bisection: `ops.token_threshold` on CUDA.

Non-negative floats have the order of their bits, so bisecting the bits of the threshold ends with the exact answer
after at most 30 passes over the row. Both ends move to weights that occur, which ends the bisection sooner.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.triton.tuning import THRESHOLD_BLOCK, THRESHOLD_WARPS


@triton.jit
@no_type_check
def split(weights, size, pivot, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the number or sum of weights with bits of at least `pivot`, the least such bits, the greatest other bits.

    Sums have the same order of additions at every pivot, so they fall as the pivot rises, rounding included.
    """
    amount = tl.zeros([BLOCK], tl.float32)
    least = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    greatest = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        # Weights past the end count as 0, which is below every pivot.
        weight = tl.load(weights + index, mask=index < size, other=0.0)
        bits = weight.to(tl.int32, bitcast=True)
        is_above = bits >= pivot
        amount += tl.where(is_above, 1.0 if COUNT else weight, 0.0)
        least = tl.minimum(least, tl.where(is_above, bits, 0x7FFFFFFF))
        greatest = tl.maximum(greatest, tl.where(is_above, 0, bits))
    return tl.sum(amount), tl.min(least), tl.max(greatest)


@triton.jit
@no_type_check
def bisect(weights, size, low, enough, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the greatest bits of a weight at which the count or sum is at least `enough`; at `low` it is."""
    high = tl.full((), 0x3F800001, tl.int32)  # above 1.0, the largest weight
    while low + 1 < high:
        pivot = low + (high - low) // 2
        amount, least, greatest = split(weights, size, pivot, COUNT, BLOCK)
        low = tl.where(amount >= enough, least, low)
        high = tl.where(amount >= enough, high, greatest + 1)
    return low


@triton.jit
@no_type_check
def token_threshold_kernel(weights, top_k, top_p, thresholds, size, BLOCK: tl.constexpr):
    """Find the threshold of one row. Grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    weights += row * size
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    low = tl.full((), 0, tl.int32)
    if k < size:
        low = bisect(weights, size, low, tl.maximum(k, 1).to(tl.float32), True, BLOCK)
    if p < 1.0:
        total, _, _ = split(weights, size, low, False, BLOCK)
        low = bisect(weights, size, low, p * total, False, BLOCK)
    tl.store(thresholds + row, low.to(tl.float32, bitcast=True))


def token_threshold(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Compute `ops.token_threshold` of weights [R, V] with V below 2**24; top_k is int32 or int64."""
    num_sampled, size = weights.shape
    thresholds = torch.empty(num_sampled, dtype=torch.float32, device=weights.device)
    if num_sampled:
        token_threshold_kernel[(num_sampled,)](
            weights.contiguous(),
            top_k.contiguous(),
            top_p.contiguous(),
            thresholds,
            size,
            BLOCK=min(THRESHOLD_BLOCK, triton.next_power_of_2(size)),
            num_warps=THRESHOLD_WARPS,
        )
    return thresholds
