"""Weights as small numbers with a scale for each group of columns, in the form that is common to all checkpoints.

Readers of checkpoints make a `QuantizedTensor`, `quantize` makes one of a plain matrix, and `ops.pack` lays it out for
the kernels of a device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Kind = Literal["int4", "int8", "fp8"]

MIN_GROUP = 16  # columns that share a scale, in all kernels
_FP8 = torch.float8_e4m3fn
_CODE_RANGE: dict[Kind, tuple[int, int]] = {"int4": (-8, 7), "int8": (-128, 127)}
_ROWS = 1024  # quantised at a time, which bounds the temporary memory


class Quantization(NamedTuple):
    """How a plain matrix is quantised. group_size: columns that share a scale; None for all columns of a row."""

    kind: Kind
    group_size: int | None = None


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix [N, K]: the element in row n and column k of group g is `codes[n, k] * scales[n, g] + offsets[n, g]`.

    A group is `group_size` neighbouring columns; the last group of a row may be shorter.

    codes: [N, K], int8 from -8 to 7 (int4) or from -128 to 127 (int8), or float8_e4m3fn (fp8).
    scales, offsets: [N, G] in float32. offsets: None where all are 0, and always in fp8.
    column_order: [K], the column of the input that each column of the codes multiplies; None for the same order. GPTQ's
        act-order sorts columns by importance before it groups them.
    """

    kind: Kind
    codes: Tensor
    scales: Float[Tensor, "N G"]
    offsets: Float[Tensor, "N G"] | None
    group_size: int
    column_order: Int[Tensor, "K"] | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the matrix."""
        return self.codes.shape

    def numel(self) -> int:
        """Return the number of elements of the matrix."""
        return self.codes.numel()

    def to(self, device: torch.device) -> "QuantizedTensor":
        """Return the matrix on a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            offsets=moved(self.offsets),
            column_order=moved(self.column_order),
        )

    def narrow(self, dim: int, start: int, length: int) -> "QuantizedTensor":
        """Return some rows (dim 0) or columns (dim 1).

        Columns that begin or end within a group get the smaller groups that fit both. Raises ValueError if those have
        fewer than 16 columns, or if the columns are reordered.
        """
        if length == self.shape[dim]:
            return self
        if dim == 0:
            offsets = None if self.offsets is None else self.offsets.narrow(0, start, length)
            return replace(
                self,
                codes=self.codes.narrow(0, start, length),
                scales=self.scales.narrow(0, start, length),
                offsets=offsets,
            )
        if self.column_order is not None:
            raise ValueError("columns in act-order cannot be split between ranks")
        size = self.group_size
        if size < self.shape[1]:
            size = math.gcd(size, start)
            if start + length < self.shape[1]:
                size = math.gcd(size, length)
            if size < MIN_GROUP:
                raise ValueError(
                    f"columns {start} to {start + length} split groups of {self.group_size} into {size}, at least"
                    f" {MIN_GROUP} are needed"
                )
        regrouped = self._with_group_size(size) if size < self.shape[1] else self
        first, count = start // size, -(-length // size)
        if size >= self.shape[1]:
            first, count, size = 0, 1, length
        return replace(
            regrouped,
            codes=self.codes.narrow(1, start, length),
            scales=regrouped.scales.narrow(1, first, count),
            offsets=None if regrouped.offsets is None else regrouped.offsets.narrow(1, first, count),
            group_size=size,
        )

    def _with_group_size(self, size: int) -> "QuantizedTensor":
        """Return the same matrix in smaller groups; `size` divides the group size."""
        if size == self.group_size:
            return self
        group = torch.arange(-(-self.shape[1] // size), device=self.scales.device) * size // self.group_size
        return replace(
            self,
            scales=self.scales[:, group],
            offsets=None if self.offsets is None else self.offsets[:, group],
            group_size=size,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N K"]:
        """Return the matrix, computed in float32, with its columns in the order of the input."""
        result = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        group = torch.arange(self.shape[1], device=self.codes.device) // self.group_size
        for first in range(0, self.shape[0], _ROWS):
            rows = slice(first, first + _ROWS)
            part = self.codes[rows].float() * self.scales[rows][:, group]
            if self.offsets is not None:
                part += self.offsets[rows][:, group]
            if self.column_order is None:
                result[rows] = part.to(dtype)
            else:
                result[rows, self.column_order.long()] = part.to(dtype)
        return result


def concatenate(parts: Sequence[QuantizedTensor]) -> QuantizedTensor | None:
    """Stack matrices of the same number of columns along their rows; None where no kernel takes the result.

    Of int4 and int8 parts the result is int8, of different groups it has the smallest common ones. None: fp8 beside
    integers, different orders of columns, or groups of fewer than 16 columns.
    """
    first, *others = parts
    if not others:
        return first
    kinds = {part.kind for part in parts}
    if "fp8" in kinds and len(kinds) > 1:
        return None
    order = first.column_order
    for part in others:
        if (part.column_order is None) != (order is None):
            return None
        if order is not None and part.column_order is not None and not torch.equal(part.column_order, order):
            return None
    columns = first.shape[1]
    sizes = {min(part.group_size, columns) for part in parts}
    size = sizes.pop() if len(sizes) == 1 else math.gcd(*sizes)
    if size < min(MIN_GROUP, columns):
        return None
    parts = [part._with_group_size(size) if size < columns else part for part in parts]
    offsets = None
    if any(part.offsets is not None for part in parts):
        offsets = torch.cat([torch.zeros_like(part.scales) if part.offsets is None else part.offsets for part in parts])
    return QuantizedTensor(
        kind=first.kind if len(kinds) == 1 else "int8",
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        offsets=offsets,
        group_size=size,
        column_order=order,
    )


def quantize(weight: Float[Tensor, "N K"], quantization: Quantization) -> QuantizedTensor:
    """Round a matrix to the nearest codes of scales and offsets that are float16 already, as kernels read them.

    int4: a group's smallest and largest elements become -8 and 7. Symmetric groups of 32 raise the perplexity of the
    default model by 27 %, these by less than 0.1 %: its weights were rounded so before.
    int8: symmetric around 0; the element of largest magnitude becomes 127 or -127.
    fp8: symmetric; the scale is the largest magnitude over 448, the largest number of e4m3, in float32.
    """
    kind, group_size = quantization
    rows, columns = weight.shape
    size = min(group_size or columns, columns)
    groups = -(-columns // size)
    codes = torch.empty(rows, columns, dtype=_FP8 if kind == "fp8" else torch.int8, device=weight.device)
    scales = torch.empty(rows, groups, device=weight.device)
    offsets = torch.empty_like(scales) if kind == "int4" else None
    for first in range(0, rows, _ROWS):
        part = slice(first, first + _ROWS)
        # The last group is filled up with its last element, which changes no range.
        wide = torch.nn.functional.pad(weight[part].float(), (0, groups * size - columns), mode="replicate")
        wide = wide.unflatten(1, (groups, size))
        scales[part], shift = _scales_and_offsets(wide, kind)
        if offsets is not None:
            offsets[part] = shift
            wide = wide - shift.unsqueeze(-1)
        divided = wide / torch.where(scales[part] == 0, 1.0, scales[part]).unsqueeze(-1)
        if kind != "fp8":
            divided = divided.round().clamp(*_CODE_RANGE[kind])
        codes[part] = divided.flatten(1)[:, :columns].to(codes.dtype)
    return QuantizedTensor(kind, codes, scales, offsets, size)


def _scales_and_offsets(groups: Float[Tensor, "N G size"], kind: Kind) -> tuple[Tensor, Tensor]:
    if kind == "int4":
        least, largest = groups.aminmax(dim=-1)
        scales = ((largest - least) / 15).half().float()
        return scales, (least + 8 * scales).half().float()
    largest = groups.abs().amax(dim=-1)
    return largest / 448 if kind == "fp8" else (largest / 127).half().float(), torch.zeros_like(largest)
