"""The column of each row's largest logit: `ops.argmax` on CUDA."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.triton.linear_residual import MAX_COUNTERS, split_counters
from dispec.ops.triton.tuning import ARGMAX_BLOCK, ARGMAX_WARPS


@triton.jit(do_not_specialize=["splits"])
@no_type_check
def argmax_kernel(
    output,
    partial,
    counters,
    logits,
    size,
    row_stride,
    splits,
    SPLITS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the largest of BLOCK logits of a row. Grid (R, splits).

    Logits become integers that order as the floats do, NaN last. The largest one and its column are one integer of 64
    bits in `partial` [R, splits]; its lower half falls with the column, so that the first of equal logits is the
    largest. The last program of a row to finish, found by `counters` (zero before and after), compares these.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Columns past the end are -inf, and come after all others.
    logit = tl.load(logits + row * row_stride + column, mask=column < size, other=-float("inf")).to(tl.float32)
    bits = logit.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of negative floats, which have the reverse order of their bits
    order = tl.where(logit == 0.0, 0, order)  # -0.0 equals 0.0
    order = tl.where(logit != logit, 0x7FFFFFFF, order)
    largest = tl.max(order, 0)
    first = tl.min(tl.where(order == largest, column, 0x7FFFFFFF), 0)
    if SPLITS_PADDED > 1:
        own = (largest.to(tl.int64) << 32) | (0x7FFFFFFF - first).to(tl.int64)
        tl.store(partial + row * splits + tl.program_id(1), own)
        tl.debug_barrier()  # the split is stored before it is counted
        if tl.atomic_add(counters + row, 1, sem="acq_rel") != splits - 1:
            return
        tl.store(counters + row, 0)
        split = tl.arange(0, SPLITS_PADDED)
        # Lanes past the splits read the first one again, which leaves the largest as it is.
        at = partial + row * splits + tl.where(split < splits, split, 0)
        first = 0x7FFFFFFF - (tl.max(tl.load(at, cache_modifier=".cg"), 0) & 0x7FFFFFFF)
    tl.store(output + row, first.to(tl.int64))


def argmax(logits: Tensor) -> Tensor:
    """Compute `ops.argmax` of logits [R, V], contiguous in their rows, V below 2^31. Returns [R] int64.

    Launches share their counters and must not run concurrently.
    """
    num_rows, size = logits.shape
    if num_rows > MAX_COUNTERS:
        return logits.argmax(-1)
    output = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return output
    splits = triton.cdiv(size, ARGMAX_BLOCK)
    argmax_kernel[(num_rows, splits)](
        output,
        torch.empty((num_rows, splits), dtype=torch.int64, device=logits.device),
        split_counters(logits.device),
        logits,
        size,
        logits.stride(0),
        splits,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        BLOCK=ARGMAX_BLOCK,
        num_warps=ARGMAX_WARPS,
    )
    return output
