"""Quantised GGUF tensors as `QuantizedTensor`s.

A row is cut into blocks of 32 or 256 numbers. The layouts are those of `ggml-common.h` in llama.cpp: bytes of a block
are little-endian; `d` and `m` are float16.
"""

from collections.abc import Callable
from typing import NamedTuple

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from dispec.ops import Kind, QuantizedTensor

_Type = gguf.GGMLQuantizationType
_Bytes = NDArray[np.uint8]
_Floats = NDArray[np.float32]
# Codes of blocks [B, block size], scales [B, groups of a block] and offsets.
_Decoded = tuple[NDArray[np.int8], _Floats, _Floats | None]

_MAX_DECODED = 2**20  # numbers at once, which bounds the temporary memory to a few MB


class _Format(NamedTuple):
    kind: Kind
    group_size: int
    has_offsets: bool
    decode: Callable[[_Bytes], _Decoded]


def has_codes(kind: gguf.GGMLQuantizationType) -> bool:
    """Return whether `read_codes` reads tensors of a type."""
    return kind in _FORMATS


def read_codes(blocks: _Bytes, kind: gguf.GGMLQuantizationType) -> QuantizedTensor:
    """Return the numbers of blocks [N, bytes of a row], of a type with `has_codes`.

    Codes are centred around 0; the shift is part of the offsets. The numbers are exact for types without offsets, and
    within float32 rounding for the others.
    """
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    form = _FORMATS[kind]
    rows, columns = blocks.shape[0], blocks.shape[1] // block_bytes * block_size
    codes = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // form.group_size), np.float32)
    offsets = np.empty_like(scales) if form.has_offsets else None
    step = max(1, _MAX_DECODED // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        decoded = form.decode(np.ascontiguousarray(blocks[part]).reshape(-1, block_bytes))
        for target, values in zip((codes, scales, offsets), decoded, strict=True):
            if target is not None and values is not None:
                target[part] = values.reshape(-1, target.shape[1])
    return QuantizedTensor(
        form.kind,
        torch.from_numpy(codes),
        torch.from_numpy(scales),
        None if offsets is None else torch.from_numpy(offsets),
        form.group_size,
    )


def _float16(blocks: _Bytes, start: int) -> _Floats:
    return blocks[:, start : start + 2].view(np.float16).astype(np.float32)


def _nibbles(packed: _Bytes, run: int) -> _Bytes:
    """Return the 4-bit numbers of bytes [B, n]: of each `run` bytes first the low halves, then the high ones."""
    halves = packed.reshape(len(packed), -1, 1, run) >> np.array([[0], [4]], np.uint8)
    return (halves & np.uint8(15)).reshape(len(packed), -1)


def _centred(codes: _Bytes, centre: int) -> NDArray[np.int8]:
    return codes.view(np.int8) - np.int8(centre)


def _q8_0(blocks: _Bytes) -> _Decoded:
    return blocks[:, 2:].view(np.int8), _float16(blocks, 0), None


def _q4_0(blocks: _Bytes) -> _Decoded:
    return _centred(_nibbles(blocks[:, 2:], 16), 8), _float16(blocks, 0), None


def _q4_1(blocks: _Bytes) -> _Decoded:
    d, m = _float16(blocks, 0), _float16(blocks, 2)
    return _centred(_nibbles(blocks[:, 4:], 16), 8), d, m + 8 * d


def _q5_0(blocks: _Bytes) -> _Decoded:
    return _centred(_five_bits(blocks[:, 2:]), 16), _float16(blocks, 0), None


def _q5_1(blocks: _Bytes) -> _Decoded:
    d, m = _float16(blocks, 0), _float16(blocks, 2)
    return _centred(_five_bits(blocks[:, 4:]), 16), d, m + 16 * d


def _five_bits(blocks: _Bytes) -> _Bytes:
    """Return the numbers of 4 bytes with their fifth bits, in order, and 16 bytes with their low bits."""
    fifth = np.unpackbits(blocks[:, :4], axis=1, bitorder="little")
    return _nibbles(blocks[:, 4:], 16) | fifth << np.uint8(4)


def _q4_k(blocks: _Bytes) -> _Decoded:
    scales, minima = _scales_and_minima(blocks)
    return _centred(_nibbles(blocks[:, 16:], 32), 8), scales, 8 * scales - minima


def _q5_k(blocks: _Bytes) -> _Decoded:
    scales, minima = _scales_and_minima(blocks)
    # Bit g of byte j is the fifth bit of number j in group g.
    fifth = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").swapaxes(1, 2).reshape(-1, 256)
    return _centred(_nibbles(blocks[:, 48:], 32) | fifth << np.uint8(4), 16), scales, 16 * scales - minima


def _scales_and_minima(blocks: _Bytes) -> tuple[_Floats, _Floats]:
    """Return scales and minima [B, 8] of Q4_K and Q5_K: 6-bit numbers times two float16 of the block.

    Of the first four groups they are the low 6 bits of a byte each. Of the last four, the low 4 bits are in bytes 8 to
    11 (scales in the low halves) and the upper 2 bits on top of the first four's.
    """
    packed = blocks[:, 4:16]
    first, last = packed[:, :8], packed[:, 8:]
    upper = first >> 2 & np.uint8(0x30)
    scales = np.concatenate([first[:, :4] & np.uint8(63), last & np.uint8(15) | upper[:, :4]], axis=1)
    minima = np.concatenate([first[:, 4:] & np.uint8(63), last >> 4 | upper[:, 4:]], axis=1)
    return _float16(blocks, 0) * scales, _float16(blocks, 2) * minima


def _q6_k(blocks: _Bytes) -> _Decoded:
    low = _nibbles(blocks[:, :128], 64)
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & np.uint8(3)
    scales = _float16(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return _centred(low | upper.reshape(-1, 256) << np.uint8(4), 32), scales, None


_FORMATS = {
    _Type.Q8_0: _Format("int8", 32, False, _q8_0),
    _Type.Q4_0: _Format("int4", 32, False, _q4_0),
    _Type.Q4_1: _Format("int4", 32, True, _q4_1),
    _Type.Q5_0: _Format("int8", 32, False, _q5_0),
    _Type.Q5_1: _Format("int8", 32, True, _q5_1),
    _Type.Q4_K: _Format("int4", 32, True, _q4_k),
    _Type.Q5_K: _Format("int8", 32, True, _q5_k),
    _Type.Q6_K: _Format("int8", 16, False, _q6_k),
}
