"""The column of each row's largest logit: `ops.argmax` on CUDA."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.triton.linear_residual import MAX_COUNTERS, split_counters
from dispec.ops.triton.tuning import ARGMAX_BLOCK, ARGMAX_PROGRAMS_PER_MULTIPROCESSOR, ARGMAX_WARPS, describe


@triton.jit(do_not_specialize=["blocks_per_split", "splits"])
@no_type_check
def argmax_kernel(
    output,
    partial,
    counters,
    logits,
    size,
    row_stride,
    blocks_per_split,
    splits,
    SPLITS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the largest of one split of a row. Grid (R, splits).

    A logit and its column are one integer of 64 bits: the upper half orders as the floats do, NaN last; the lower half
    falls with the column, so that the first of equal logits is the largest. The last program of a row to finish, found
    by `counters` (zero before and after), compares the row's splits in `partial` [R, splits].
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, (size + BLOCK - 1) // BLOCK)
    largest = tl.full([BLOCK], -0x8000000000000000, tl.int64)
    for block in range(first, last):
        column = block * BLOCK + tl.arange(0, BLOCK)
        # Columns past the end are -inf, and come after all others.
        logit = tl.load(logits + row * row_stride + column, mask=column < size, other=-float("inf")).to(tl.float32)
        bits = logit.to(tl.int32, bitcast=True)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of negative floats, which have the reverse order of their bits
        order = tl.where(logit == 0.0, 0, order)  # -0.0 equals 0.0
        order = tl.where(logit != logit, 0x7FFFFFFF, order)
        largest = tl.maximum(largest, (order.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64))
    best = tl.max(largest, 0)
    if SPLITS_PADDED > 1:
        tl.store(partial + row * splits + tl.program_id(1), best)
        tl.debug_barrier()  # the split is stored before it is counted
        if tl.atomic_add(counters + row, 1, sem="acq_rel") != splits - 1:
            return
        tl.store(counters + row, 0)
        split = tl.arange(0, SPLITS_PADDED)
        # Lanes past the splits read the first one again, which leaves the largest as it is.
        at = partial + row * splits + tl.where(split < splits, split, 0)
        best = tl.max(tl.load(at, cache_modifier=".cg"), 0)
    tl.store(output + row, 0x7FFFFFFF - (best & 0x7FFFFFFF))


def argmax(logits: Tensor) -> Tensor:
    """Compute `ops.argmax` of logits [R, V], contiguous in their rows, V below 2^31. Returns [R] int64.

    Launches with several splits share their counters and must not run concurrently.
    """
    num_rows, size = logits.shape
    output = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return output
    blocks = triton.cdiv(size, ARGMAX_BLOCK)
    programs = describe(logits.device).multiprocessors * ARGMAX_PROGRAMS_PER_MULTIPROCESSOR
    wanted = max(programs // num_rows, 1) if num_rows <= MAX_COUNTERS else 1
    blocks_per_split = triton.cdiv(blocks, wanted)
    splits = triton.cdiv(blocks, blocks_per_split)
    partial = counters = output
    if splits > 1:
        partial = torch.empty((num_rows, splits), dtype=torch.int64, device=logits.device)
        counters = split_counters(logits.device)
    argmax_kernel[(num_rows, splits)](
        output,
        partial,
        counters,
        logits,
        size,
        logits.stride(0),
        blocks_per_split,
        splits,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        BLOCK=ARGMAX_BLOCK,
        num_warps=ARGMAX_WARPS,
    )
    return output
