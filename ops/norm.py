"""RMS norm of hidden states and of heads."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Norm(NamedTuple):
    """An RMS norm: its weight [N], and `eps`, which keeps the divisor from zero."""

    weight: Tensor
    eps: float


def rms_norm(x: Float[Tensor, "*shape N"], norm: Norm) -> Float[Tensor, "*shape N"]:
    """Return `x / sqrt(mean(x²) + eps) * weight` (arXiv:1910.07467), rounded from float32 before the weight."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + norm.eps)
    return normed.to(x.dtype) * norm.weight
