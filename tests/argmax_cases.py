"""Rows whose largest logit is hard to find, for the CPU, interpreter and GPU tests of `argmax`."""

import torch
from torch import Tensor

INFINITY, NAN = torch.inf, torch.nan


def rows_with_first_largest(size: int, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """Return logits [R, size], a strided view, and the column of each row's largest logit, the first of several."""
    assert size >= 5
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(16, size + 3, generator=generator).to(dtype)[:, :size]
    last, middle = size - 1, size // 2
    logits[0] = -INFINITY
    logits[1] = INFINITY
    logits[2, middle] = NAN
    logits[3, [1, last]] = NAN
    logits[4] = NAN
    logits[5] = logits[5].clamp(max=-1.0)
    logits[5, [2, last]] = -0.5  # the largest is negative
    logits[6] = -1.0
    logits[6, 1], logits[6, middle], logits[6, last] = -0.0, 0.0, 0.0
    logits[7, [middle, last]] = INFINITY
    logits[8, last] = INFINITY
    logits[9, 0] = INFINITY
    logits[10] = -INFINITY
    logits[10, last] = torch.finfo(dtype).min
    logits[11] = 3.0
    logits[12] = -logits[12].abs() - 1.0
    logits[12, last] = 0.0
    known = {0: 0, 1: 0, 2: middle, 3: 1, 4: 0, 5: 2, 6: 1, 7: middle, 8: last, 9: 0, 10: last, 11: 0, 12: last}
    columns = []
    for index, row in enumerate(logits.double()):
        largest = row == row.max()
        columns.append(known[index] if index in known else int(largest.nonzero()[0, 0]))
    return logits, columns
