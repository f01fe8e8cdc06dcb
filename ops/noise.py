"""The random numbers of sampling: a hash of seed, position and token id, without generator state.

The noise of a token at a position does not depend on what else is in the batch. It compiles, replays in a CUDA graph,
and is the same after preemption. Counter-based generators: Salmon et al., SC 2011. `ops/cpu/sampling.cpp` computes the
same bits.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MASK = 0xFFFFFFFF


def uniform_noise(
    seed: Int[Tensor, "R"], position: Int[Tensor, "R"], token_ids: Int[Tensor, "N"]
) -> Float[Tensor, "R N"]:
    """Return numbers in (0, 1], uniform to 32 bits, from the counter (seed, position, token id).

    All operations are on integers below 2**63, so every device and compiler gives the same bits.
    """
    seed = seed.long()
    row = _mix(_mix(seed & _MASK) ^ _mix((seed >> 32) & _MASK ^ 0x9E3779B9) ^ (position.long() & _MASK))
    row_again = _mix(row ^ 0x5BD1E995)
    mixed = _mix((_mix(token_ids.long() ^ row[:, None]) + row_again[:, None]) & _MASK)
    return (mixed.to(torch.float32) + 0.5) * 2.0**-32


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Apply a bijection of 32-bit integers with good avalanche (C. Wellons' hash prospector, two rounds).

    Both multipliers are below 2**31, so the product of a 32-bit value stays within a signed 64-bit integer.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
