"""Weights for the tests of quantised linear layers."""

import torch

from dispec.ops.quantization import Kind, QuantizedTensor


def random_weight(kind: Kind, rows: int, columns: int, group: int | None, has_offsets: bool) -> QuantizedTensor:
    """A weight with codes of the whole range, whose scales and offsets are exact in float16."""
    largest = 8 if kind == "int4" else 128
    size = min(group or columns, columns)
    groups = -(-columns // size)
    scales = (torch.rand(rows, groups) + 0.5).half().float() / largest
    offsets = (torch.randn(rows, groups) / 4).half().float() if has_offsets else None
    codes = torch.randint(-largest, largest, (rows, columns), dtype=torch.int8)
    return QuantizedTensor(kind, codes, scales, offsets, size)
