"""The layout of int4 and int8 weights on CUDA.

A weight [N, K] is int16 words of 4 codes (int4) or 2 (int8), [ceil(N / 16), blocks, 16, WORDS]. A block holds
the columns of WORDS words, and code i of word j is that of column `i * WORDS + j` of the block: the words of a tile,
shifted, are a tile of neighbouring columns, already in the registers that a tensor core reads. Two words share a
register, so that an instruction unpacks two codes. int4 codes are stored plus 8, int8 codes as they are; rows and
columns are padded with zeros. Scales and offsets: float16 [G, 16 * ceil(N / 16)].
"""

import torch
import triton
from torch import Tensor

ROWS = 16  # of a weight that are neighbours in memory: a block of them is 1 KiB
CODES = {"int4": 4, "int8": 2}  # of a word


def block_words(kind: str, group_size: int, in_features: int) -> int:
    """Return the words of a block: as many as divide a group, so that the columns of a code have one scale."""
    widest = 128 // CODES[kind]
    if group_size >= in_features:
        return widest
    return max(size for size in (16, 32, 64) if size <= widest and group_size % size == 0)


def pack_codes(codes: Tensor, kind: str, group_size: int) -> Tensor:
    """Return the words [ceil(N / 16), blocks, 16, WORDS] of codes [N, K]."""
    (rows, columns), per_word = codes.shape, CODES[kind]
    size, bits = block_words(kind, group_size, columns), 16 // per_word
    blocks = triton.cdiv(columns, size * per_word)
    result = codes.new_empty((triton.cdiv(rows, ROWS), blocks, ROWS, size), dtype=torch.int16)
    step = 1024  # rows at a time, which bounds the temporary memory
    for first in range(0, rows, step):
        part = codes[first : first + step]
        pad = (0, blocks * size * per_word - columns, 0, -len(part) % ROWS)
        part = torch.nn.functional.pad(part, pad).view(-1, ROWS, blocks, per_word, size).int()
        if kind == "int4":
            part += 8
        word = part[:, :, :, 0] & (1 << bits) - 1
        for index in range(1, per_word):
            word |= (part[:, :, :, index] & (1 << bits) - 1) << bits * index
        result[first // ROWS : first // ROWS + len(part)] = word.to(torch.int16).transpose(1, 2)
    return result


def pack_scales(scales: Tensor) -> Tensor:
    """Return scales or offsets [N, G] as float16 [G, 16 * ceil(N / 16)]."""
    return torch.nn.functional.pad(scales.half().T, (0, -len(scales) % ROWS)).contiguous()


def read_rows(
    words: Tensor, scales: Tensor, offsets: Tensor | None, indices: Tensor, in_features: int, kind: str, group_size: int
) -> Tensor:
    """Return rows [T, in_features] of a packed weight, in float32."""
    bits = 16 // CODES[kind]
    shifts = torch.arange(0, 16, bits, device=words.device, dtype=torch.int32)[:, None]
    rows = words[indices // ROWS, :, indices % ROWS].int()  # [T, blocks, WORDS]
    codes = (rows[:, :, None] >> shifts & (1 << bits) - 1).flatten(1)[:, :in_features]
    codes = codes - 8 if kind == "int4" else (codes ^ 128) - 128
    group = torch.arange(in_features, device=words.device) // group_size
    values = codes.float() * scales.T[indices].float()[:, group]
    return values if offsets is None else values + offsets.T[indices].float()[:, group]
