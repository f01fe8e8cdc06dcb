"""From logits to tokens, with random numbers that depend on the request and the position alone.

The noise of vocabulary entry v at position p of a request with seed s is a hash of (s, p, v): it needs no
generator state, so it compiles and replays in a CUDA graph, and a seeded request gets the same noise alone,
batched, preempted or recomputed (the idea is that of counter-based generators, Salmon et al., SC 2011).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layers.types import Sampling

_MASK = 0xFFFFFFFF


def sample(logits: Float[Tensor, "R V"], sampling: Sampling | None) -> Int[Tensor, "R"]:
    """Choose each row's token: the largest logit where greedy, else a draw from softmax(logits / temperature).

    A draw is the argmax of logits / temperature plus Gumbel noise (Gumbel 1954), so no softmax, sort or
    cumulative sum is needed. Ties go to the lowest token id.
    """
    greedy = logits.argmax(dim=-1)
    if sampling is None:
        return greedy
    uniform = uniform_noise(sampling.seed, sampling.position, logits.shape[-1])
    # -log(-log1p(-u)): written so that the winners, whose u is near zero, keep all of u's 32 bits.
    gumbel = -torch.log(-torch.log1p(-uniform))
    is_greedy = sampling.temperature == 0
    temperature = torch.where(is_greedy, torch.ones_like(sampling.temperature), sampling.temperature)
    drawn = (logits / temperature[:, None] + gumbel).argmax(dim=-1)
    return torch.where(is_greedy, greedy, drawn)


def uniform_noise(seed: Int[Tensor, "R"], position: Int[Tensor, "R"], size: int) -> Float[Tensor, "R size"]:
    """Numbers in (0, 1], uniform to 32 bits, from the counter (seed, position, column).

    Only integer operations on values below 2**63, so every device and compiler gives the same bits.
    """
    seed = seed.long()
    row = _mix(_mix(seed & _MASK) ^ _mix((seed >> 32) & _MASK ^ 0x9E3779B9) ^ (position.long() & _MASK))
    row_again = _mix(row ^ 0x5BD1E995)
    columns = torch.arange(size, device=seed.device, dtype=torch.int64)
    mixed = _mix((_mix(columns ^ row[:, None]) + row_again[:, None]) & _MASK)
    return (mixed.to(torch.float32) + 0.5) * 2.0**-32


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """A bijection of 32-bit integers with good avalanche (C. Wellons' hash prospector, two-round variant).

    Both multipliers are below 2**31, so the product of a 32-bit value stays within a signed 64-bit integer.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
