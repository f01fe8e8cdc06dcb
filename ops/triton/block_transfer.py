"""Copy KV blocks between caches and fold them: `ops.transfer_blocks` and `ops.fold_blocks` on CUDA.

A program reads one block's keys and values of one layer, 16 bytes a thread at a time, and stores and folds what it has
read: the fold costs no further pass.
"""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

# Of 8 bytes: 8 loads of 16 bytes in flight in each of 128 threads. On an H200, a transfer of 117 MB takes 63 µs (3.7
# TB/s read and written); with tiles of 1024 words it takes 66, with 512 words in 64 threads 75.
TILE_WORDS = 2048
# The keys of `ops.block_transfer`.
A_FACTOR, A_SUMMAND = tl.constexpr(0x9E3779B1), tl.constexpr(0x85EBCA77)
B_FACTOR, B_SUMMAND = tl.constexpr(0xC2B2AE3D), tl.constexpr(0x27D4EB2F)


@triton.jit
@no_type_check
def transfer_row(source, target, COPIES: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr):
    """Copy WORDS words if COPIES, and return their fold as int64."""
    total = tl.zeros([TILE], tl.uint64)
    for start in tl.static_range(0, WORDS, TILE):
        index = start + tl.arange(0, TILE)
        mask = index < WORDS
        word = tl.load(source + index, mask=mask, other=0)
        if COPIES:
            tl.store(target + index, word, mask=mask)
        bits = word.to(tl.uint64, bitcast=True)
        position = index.to(tl.uint32)
        low = bits.to(tl.uint32) + (position * A_FACTOR + A_SUMMAND)
        high = (bits >> 32).to(tl.uint32) + (position * B_FACTOR + B_SUMMAND)
        product = low.to(tl.uint64) * high.to(tl.uint64)
        total += tl.where(mask, product, tl.zeros_like(product))
    return tl.sum(total).to(tl.int64, bitcast=True)


@triton.jit(do_not_specialize=["num_source_blocks", "num_blocks", "num_layers"])
@no_type_check
def transfer_blocks_kernel(
    source_keys,
    source_values,
    source_blocks,
    keys,
    values,
    blocks,
    folds,
    num_source_blocks,
    num_blocks,
    num_layers,
    COPIES: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Transfer one block in one layer. Grid (N, L). folds: [N, 2 L]."""
    item = tl.program_id(0)
    layer = tl.program_id(1)
    source = (layer.to(tl.int64) * num_source_blocks + tl.load(source_blocks + item)) * WORDS
    target = source
    if COPIES:
        target = (layer.to(tl.int64) * num_blocks + tl.load(blocks + item)) * WORDS
    row = folds + item.to(tl.int64) * 2 * num_layers + layer
    tl.store(row, transfer_row(source_keys + source, keys + target, COPIES, WORDS, TILE))
    tl.store(row + num_layers, transfer_row(source_values + source, values + target, COPIES, WORDS, TILE))


def _launch(source: tuple[Tensor, Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor], copies: bool) -> Tensor:
    num_layers, num_source_blocks, words = source[0].shape
    count = source[2].shape[0]
    folds = target[0].new_empty(count, 2 * num_layers)
    if count:
        transfer_blocks_kernel[(count, num_layers)](
            *source,
            *target,
            folds,
            num_source_blocks,
            target[0].shape[1],
            num_layers,
            COPIES=copies,
            WORDS=words,
            TILE=min(TILE_WORDS, triton.next_power_of_2(words)),
            num_warps=4,
        )
    return folds


def fold_blocks(keys: Tensor, values: Tensor, blocks: Tensor) -> Tensor:
    """Compute `ops.fold_blocks` of contiguous keys and values; block numbers are int32 or int64."""
    return _launch((keys, values, blocks), (keys, values, blocks), False)


def transfer_blocks(
    source_keys: Tensor, source_values: Tensor, source_blocks: Tensor, keys: Tensor, values: Tensor, blocks: Tensor
) -> Tensor:
    """Compute `ops.transfer_blocks` of contiguous caches; block numbers are int32 or int64."""
    return _launch((source_keys, source_values, source_blocks), (keys, values, blocks), True)
