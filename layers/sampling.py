"""From logits to tokens, with random numbers that depend on seed, position and token id alone (`ops.noise`)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec import ops
from dispec.layers.types import Sampling

_BELOW_ONE = 1 - 2.0**-24  # the float32 before 1


def greedy(logits: Float[Tensor, "R V"]) -> Int[Tensor, "R"]:
    """Each row's largest logit, the lowest token id of several."""
    return ops.argmax(logits)


def draw(
    logits: Float[Tensor, "R V"], sampling: Sampling, token_ids: Int[Tensor, "V"] | None = None
) -> Int[Tensor, "R"]:
    """A column of each row, drawn from softmax(logits / temperature); the largest logit where the temperature is 0.

    A draw is the argmax of logits / temperature plus Gumbel noise (Gumbel 1954), so no softmax, sort or
    cumulative sum is needed. A token whose logit is -inf is never drawn while there is another. token_ids: those that
    the columns stand for, if not all in order; each has its own noise wherever its column is.
    """
    if ops.has_sample_kernel(logits.device):
        return ops.sample(logits, sampling.temperature, sampling.seed, sampling.position, token_ids)
    logits = logits.float()
    if token_ids is None:
        token_ids = torch.arange(logits.shape[-1], device=logits.device)
    uniform = ops.uniform_noise(sampling.seed, sampling.position, token_ids)
    # -log(-log1p(-u)): written so that the winners, whose u is near zero, keep all of u's 32 bits. Noise of -inf, at
    # u = 1, would make the only token that is left as good as one that is ruled out.
    gumbel = -torch.log(-torch.log1p(-uniform.clamp(max=_BELOW_ONE)))
    drawn = (scaled(logits, sampling.temperature) + gumbel).argmax(dim=-1)
    return torch.where(sampling.temperature == 0, greedy(logits), drawn)


def scaled(logits: Float[Tensor, "R V"], temperature: Float[Tensor, "R"]) -> Float[Tensor, "R V"]:
    """(logits - maximum) / temperature; where the temperature is 0, as if it were 1.

    With the maximum at 0, what a small temperature drives out of range are only tokens that are never drawn.
    """
    divisor = torch.where(temperature == 0, torch.ones_like(temperature), temperature)
    return (logits - logits.amax(dim=-1, keepdim=True)) / divisor[:, None]
