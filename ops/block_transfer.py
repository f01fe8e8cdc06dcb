"""Copies of KV blocks from one cache into another, and checksums of blocks, in one pass over their bytes.

The fold of a row of 64-bit words w[i], the bytes of a block in one layer's keys or values, is

    sum over i of (low(w[i]) + a(i)) * (high(w[i]) + b(i))  mod 2**64

with the halves of a word and the keys a(i), b(i) as 32-bit integers: the NH hash of UMAC (Black et al., "UMAC: Fast and
Secure Message Authentication", CRYPTO 1999) with keys that follow from the position. It finds accidents, not forgeries.
Sums of integers have no order, so every device computes the same fold.
"""

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from dispec.ops.registration import register

KEYS = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))  # factor and summand of a(i), and of b(i)
_LOW = 0xFFFFFFFF


def fold_blocks(
    keys: Int64[Tensor, "L NB W"], values: Int64[Tensor, "L NB W"], blocks: Int[Tensor, "N"]
) -> Int64[Tensor, "N 2*L"]:
    """Return the folds of blocks: of their keys in each layer, then of their values. Block numbers are not checked."""
    folds: Tensor = torch.ops.dispec.fold_blocks(keys, values, blocks)
    return folds


def transfer_blocks(
    source_keys: Int64[Tensor, "L NS W"],
    source_values: Int64[Tensor, "L NS W"],
    source_blocks: Int[Tensor, "N"],
    keys: Int64[Tensor, "L NB W"],
    values: Int64[Tensor, "L NB W"],
    blocks: Int[Tensor, "N"],
) -> Int64[Tensor, "N 2*L"]:
    """Copy block `source_blocks[i]` of a cache to block `blocks[i]` of another, and return the folds of what was read.

    The source may be memory of another process or, with peer access, of another device. Block numbers are not checked.
    """
    folds: Tensor = torch.ops.dispec.transfer_blocks(source_keys, source_values, source_blocks, keys, values, blocks)
    return folds


def _fold(words: Tensor) -> Tensor:
    """Return the folds of rows [..., W]. Products and sums of int64 wrap as those of uint64."""
    position = torch.arange(words.shape[-1], device=words.device)
    a, b = ((position * factor + summand) & _LOW for factor, summand in KEYS)
    low, high = words & _LOW, (words >> 32) & _LOW
    return (((low + a) & _LOW) * ((high + b) & _LOW)).sum(-1)


def _fold_blocks_cpu(keys: Tensor, values: Tensor, blocks: Tensor) -> Tensor:
    # Layer by layer: the words of one layer, and what is computed of them, stay in the CPU's cache.
    return torch.stack([_fold(layer[blocks]) for half in (keys, values) for layer in half], 1)


def _transfer_blocks_cpu(
    source_keys: Tensor, source_values: Tensor, source_blocks: Tensor, keys: Tensor, values: Tensor, blocks: Tensor
) -> Tensor:
    keys[:, blocks] = source_keys[:, source_blocks]
    values[:, blocks] = source_values[:, source_blocks]
    return _fold_blocks_cpu(source_keys, source_values, source_blocks)


def _fold_blocks_cuda(keys: Tensor, values: Tensor, blocks: Tensor) -> Tensor:
    from dispec.ops.triton.block_transfer import fold_blocks as kernel

    return kernel(keys, values, blocks)


def _transfer_blocks_cuda(*arguments: Tensor) -> Tensor:
    from dispec.ops.triton.block_transfer import transfer_blocks as kernel

    return kernel(*arguments)


def _fake_fold(keys: Tensor, values: Tensor, blocks: Tensor) -> Tensor:
    return keys.new_empty(blocks.shape[0], 2 * keys.shape[0])


def _fake_transfer(
    source_keys: Tensor, source_values: Tensor, source_blocks: Tensor, keys: Tensor, values: Tensor, blocks: Tensor
) -> Tensor:
    return _fake_fold(keys, values, blocks)


register(
    "fold_blocks(Tensor keys, Tensor values, Tensor blocks) -> Tensor",
    _fake_fold,
    cpu=_fold_blocks_cpu,
    cuda=_fold_blocks_cuda,
)
register(
    "transfer_blocks(Tensor source_keys, Tensor source_values, Tensor source_blocks, Tensor(a!) keys,"
    " Tensor(b!) values, Tensor blocks) -> Tensor",
    _fake_transfer,
    cpu=_transfer_blocks_cpu,
    cuda=_transfer_blocks_cuda,
)
