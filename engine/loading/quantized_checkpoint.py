"""Read the quantised matrices of safetensors checkpoints: GPTQ, AWQ, compressed-tensors and FP8.

Codes of 4 or 8 bits are stored without sign, packed in words of 32 bits from the lowest bits on. Here they are shifted
to be symmetric around 0, and zero points with them: an element is `(code - zero_point) * scale`.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from dispec.engine.errors import CheckpointError
from dispec.engine.loading.quantization_config import QuantizationConfig
from dispec.engine.loading.quantized_layout import (
    StoredMatrix,
    find_quantized,
    read_headers,
    tensor_names,
    unused_names,
)
from dispec.ops import Kind, QuantizedTensor

log = logging.getLogger("dispec")

# Where a word of AWQ's gemm layout has each of its 8 columns: it holds columns 0, 2, 4, 6, 1, 3, 5, 7 in this order.
_AWQ_COLUMNS = [0, 4, 1, 5, 2, 6, 3, 7]


def read_quantized(
    files: tuple[Path, ...],
    config: QuantizationConfig,
    open_file: Callable[[Path], Any],
    *,
    dtype: torch.dtype,
    keeps_quantized: bool,
) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """Yield each weight of a checkpoint, a quantised one as soon as its first tensor comes.

    open_file: returns an open safetensors file. keeps_quantized: if false, matrices are dequantised to
    `dtype`, as those in blocks are always. Raises CheckpointError for tensors that contradict each other.
    """
    matrices = find_quantized(read_headers(files), config)
    names = {weight: tensor_names(weight, matrix) for weight, matrix in matrices.items()}
    weight_of = {name: weight for weight, parts in names.items() for name in parts.values()}
    unused = {name for weight in matrices for name in unused_names(weight)}
    for note in config.notes if keeps_quantized else ():
        log.info("quantization_config: %s", note)
    if any(matrix.scheme.block for matrix in matrices.values()) and keeps_quantized:
        log.info("weights with a scale for each block are dequantised: there is no kernel for them")
    yielded = set()
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_file(file)) for file in files]
        file_of = {name: tensors for tensors in opened for name in tensors.keys()}  # noqa: SIM118 (it is no mapping)
        for name, tensors in file_of.items():
            weight = weight_of.get(name)
            if weight is None and name not in unused:
                yield name, tensors.get_tensor(name)
            elif weight is not None and weight not in yielded:
                yielded.add(weight)
                parts = {part: file_of[own].get_tensor(own) for part, own in names[weight].items()}
                _check_scales(names[weight], parts)
                yield weight, _read(weight, matrices[weight], parts, dtype, keeps_quantized=keeps_quantized)


def _read(
    weight: str, matrix: StoredMatrix, parts: Mapping[str, Tensor], dtype: torch.dtype, *, keeps_quantized: bool
) -> Tensor | QuantizedTensor:
    match matrix.scheme.layout:
        case "gptq" | "gptq_v2":
            quantized = _gptq(weight, matrix, parts)
        case "awq":
            quantized = _awq(matrix, parts)
        case "pack-quantized":
            quantized = _pack_quantized(weight, matrix, parts)
        case "int-quantized":
            quantized = _int_quantized(weight, matrix, parts)
        case "fp8":
            scale = parts["weight_scale" if "weight_scale" in parts else "weight_scale_inv"].float()
            if matrix.scheme.block is not None:
                return _dequantized_blocks(parts["weight"], scale, matrix.scheme.block, dtype)
            scales = _by_row(scale, matrix)
            quantized = QuantizedTensor("fp8", parts["weight"], scales, None, matrix.columns)
    return quantized if keeps_quantized else quantized.dequantize(dtype)


def _check_scales(names: Mapping[str, str], parts: Mapping[str, Tensor]) -> None:
    for part in ("scales", "weight_scale", "weight_scale_inv"):
        if part in parts and not bool(parts[part].isfinite().all()):
            raise CheckpointError(f"tensor {names[part]!r} has scales that are infinite or no numbers")


def _gptq(weight: str, matrix: StoredMatrix, parts: Mapping[str, Tensor]) -> QuantizedTensor:
    bits = matrix.scheme.bits
    zero_points = _unpack(parts["qzeros"], bits)
    if matrix.scheme.layout == "gptq":
        # One less is stored, so that the lowest zero point wraps around to the highest code.
        highest = 2 ** (bits - 1) - 1
        zero_points = torch.where(zero_points == highest, -highest - 1, zero_points + 1)
    codes = _unpack(parts["qweight"].T, bits)
    return _integers(weight, matrix, codes, parts["scales"].T, zero_points.T, parts.get("g_idx"))


def _awq(matrix: StoredMatrix, parts: Mapping[str, Tensor]) -> QuantizedTensor:
    def unpack(words: Tensor) -> Tensor:
        codes = _unpack(words, matrix.scheme.bits)
        return codes.unflatten(1, (-1, 8))[..., _AWQ_COLUMNS].flatten(1).T

    return _integers("", matrix, unpack(parts["qweight"]), parts["scales"].T, unpack(parts["qzeros"]))


def _pack_quantized(weight: str, matrix: StoredMatrix, parts: Mapping[str, Tensor]) -> QuantizedTensor:
    bits = matrix.scheme.bits
    if parts["weight_shape"].tolist() != [matrix.rows, matrix.columns]:
        name = tensor_names(weight, matrix)["weight_shape"]
        raise CheckpointError(
            f"tensor {name!r} is {parts['weight_shape'].tolist()}, the packed codes are"
            f" {[matrix.rows, matrix.columns]} with {bits} bits"
        )
    zero_points = parts.get("weight_zero_point")
    if zero_points is not None:
        zero_points = _unpack(zero_points.T, bits).T[: matrix.rows]
    codes, scales = _unpack(parts["weight_packed"], bits), _by_row(parts["weight_scale"], matrix)
    return _integers(weight, matrix, codes, scales, zero_points, parts.get("weight_g_idx"))


def _int_quantized(weight: str, matrix: StoredMatrix, parts: Mapping[str, Tensor]) -> QuantizedTensor:
    codes, zero_points = parts["weight"], parts.get("weight_zero_point")
    if matrix.scheme.bits == 4 and not bool(((codes >= -8) & (codes <= 7)).all()):
        raise CheckpointError(f"tensor {weight!r} has values from {codes.min()} to {codes.max()}, not of 4 bits")
    if zero_points is not None:
        zero_points = _by_row(zero_points, matrix)
    return _integers(weight, matrix, codes, _by_row(parts["weight_scale"], matrix), zero_points)


def _integers(
    weight: str,
    matrix: StoredMatrix,
    codes: Int8[Tensor, "N K"],
    scales: Float[Tensor, "N G"],
    zero_points: Tensor | None,
    group_index: Int[Tensor, "K"] | None = None,
) -> QuantizedTensor:
    kind: Kind = "int4" if matrix.scheme.bits == 4 else "int8"
    scales = scales.float().contiguous()
    offsets = None
    if zero_points is not None and zero_points.any():
        offsets = (-zero_points.float() * scales).contiguous()
    order = None if group_index is None else _column_order(weight, matrix, group_index.long())
    codes = codes if order is None else codes.index_select(1, order)
    size = min(matrix.scheme.group_size or matrix.columns, matrix.columns)
    return QuantizedTensor(kind, codes.contiguous(), scales, offsets, size, order)


def _column_order(weight: str, matrix: StoredMatrix, group_index: Int[Tensor, "K"]) -> Int[Tensor, "K"] | None:
    """Return the columns sorted by their groups (act-order), None if they are already."""
    if bool((group_index == -1).all()):  # compressed-tensors: not used
        return None
    parts = tensor_names(weight, matrix)
    name = parts["g_idx"] if "g_idx" in parts else parts["weight_g_idx"]
    lowest, highest, limit = int(group_index.min()), int(group_index.max()), matrix.num_groups
    if lowest < 0 or highest >= limit:
        raise CheckpointError(f"tensor {name!r} has groups {lowest} to {highest}, the matrix has 0 to {limit - 1}")
    counts = group_index.bincount(minlength=limit)
    size = matrix.scheme.group_size or matrix.columns
    expected = (matrix.columns - torch.arange(limit) * size).clamp(max=size)
    if wrong := (counts != expected).nonzero().flatten().tolist():
        raise CheckpointError(
            f"tensor {name!r} has {counts[wrong[0]]} columns in group {wrong[0]}, group_size calls for"
            f" {expected[wrong[0]]}"
        )
    order = group_index.argsort(stable=True)
    return None if torch.equal(order, torch.arange(matrix.columns)) else order


def _unpack(words: Int[Tensor, "M C"], bits: int) -> Int8[Tensor, "M D"]:
    """Return the codes in each row's words, shifted to be symmetric around 0."""
    stored: UInt8[Tensor, "M B"] = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (stored ^ 128).view(torch.int8)
    return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1).view(torch.int8).sub_(8)


def _by_row(scales: Tensor, matrix: StoredMatrix) -> Tensor:
    """Return the scales of each row, of which a matrix with a single scale stores one."""
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(matrix.rows, 1).contiguous()
    return scales.reshape(matrix.rows, matrix.num_groups)


def _dequantized_blocks(
    codes: Tensor, scales: Float[Tensor, "R C"], block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    result = torch.empty(codes.shape, dtype=dtype)
    rows, columns = block
    for index, of_row in enumerate(scales):
        part = slice(index * rows, (index + 1) * rows)
        result[part] = codes[part].float() * of_row.repeat_interleave(columns)[: codes.shape[1]]
    return result
