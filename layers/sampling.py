"""From logits to tokens, with random numbers that depend on seed, position and token id alone (`ops.noise`)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec import ops
from dispec.layers.types import Sampling

_BELOW_ONE = 1 - 2.0**-24  # the float32 before 1


def greedy(logits: Float[Tensor, "R V"], allowed: Int[Tensor, "R W"] | None = None) -> Int[Tensor, "R"]:
    """Return the column of each row's largest logit, the first of several. allowed: as in `sample`."""
    return ops.argmax(logits, allowed)


def sample(
    logits: Float[Tensor, "R V"],
    sampling: Sampling,
    token_ids: Int[Tensor, "V"] | None = None,
    allowed: Int[Tensor, "R W"] | None = None,
) -> Int[Tensor, "R"]:
    """Return a column of each row, sampled from softmax(logits / temperature); the largest logit at temperature 0.

    A sample is the argmax of logits / temperature plus Gumbel noise (Gumbel 1954), so no softmax, sort or cumulative
    sum is needed. A token of logit -inf is not sampled while there is another.

    token_ids: the token of each column, None for all in order. A token has its own noise in any column.
    allowed: the columns that may be sampled, as in `ops.argmax`; elsewhere `apply_token_mask` comes before.
    """
    if ops.has_sample_kernel(logits.device):
        return ops.sample(logits, sampling.temperature, sampling.seed, sampling.position, token_ids, allowed)
    likeliest = greedy(logits)
    logits = logits.float()
    if token_ids is None:
        token_ids = torch.arange(logits.shape[-1], device=logits.device)
    uniform = ops.uniform_noise(sampling.seed, sampling.position, token_ids)
    # -log(-log1p(-u)): the tokens that win have a u near zero, of which this form keeps all 32 bits. At u = 1 the noise
    # would be -inf, and an allowed token would tie with those of logit -inf.
    gumbel = -torch.log(-torch.log1p(-uniform.clamp(max=_BELOW_ONE)))
    sampled = (scale_by_temperature(logits, sampling.temperature) + gumbel).argmax(dim=-1)
    return torch.where(sampling.temperature == 0, likeliest, sampled)


def scale_by_temperature(logits: Float[Tensor, "R V"], temperature: Float[Tensor, "R"]) -> Float[Tensor, "R V"]:
    """Return (logits - maximum) / temperature, with temperature 1 in place of 0.

    With the maximum at 0, a small temperature drives out of range only tokens that are never sampled.
    """
    divisor = torch.where(temperature == 0, torch.ones_like(temperature), temperature)
    return (logits - logits.amax(dim=-1, keepdim=True)) / divisor[:, None]
