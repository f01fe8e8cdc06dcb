"""The top_k and top_p threshold of each row on CUDA, by bisection.

Floats that are not negative are ordered as their bits are, so bisecting the bits of the threshold ends after 30 passes
over the row at most, with the exact answer. Both ends are moved to a weight that occurs, which ends it sooner.
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
    """(number or sum of the weights whose bits are at least `pivot`, the least such bits, the greatest of the others).

    Sums are taken in one order whatever the pivot, so they fall as the pivot rises, rounding included.
    """
    amount = tl.zeros([BLOCK], tl.float32)
    least = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    greatest = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        # What lies past the end counts as 0, which is below every pivot.
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
    """Bits of the largest weight from which on there is `enough`, given bits `low` from which there is."""
    high = tl.full((), 0x3F800001, tl.int32)  # above 1.0: nothing is there
    while low + 1 < high:
        pivot = low + (high - low) // 2
        amount, least, greatest = split(weights, size, pivot, COUNT, BLOCK)
        low = tl.where(amount >= enough, least, low)
        high = tl.where(amount >= enough, high, greatest + 1)
    return low


@triton.jit
@no_type_check
def token_threshold_kernel(weights, top_k, top_p, thresholds, size, BLOCK: tl.constexpr):
    """One program: one row. Grid (R,)."""
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
    """The largest t of each row for which the tokens of weight at least t are enough.

    weights: [R, V], float32 in [0, 1] with row maximum 1, V below 2**24; top_k: [R], int32 or int64;
    top_p: [R], float32. Returns [R], float32.
    """
    rows, size = weights.shape
    thresholds = torch.empty(rows, dtype=torch.float32, device=weights.device)
    if rows:
        token_threshold_kernel[(rows,)](
            weights.contiguous(),
            top_k.contiguous(),
            top_p.contiguous(),
            thresholds,
            size,
            BLOCK=min(THRESHOLD_BLOCK, triton.next_power_of_2(size)),
            num_warps=THRESHOLD_WARPS,
        )
    return thresholds
