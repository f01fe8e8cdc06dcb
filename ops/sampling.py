"""Sampling a token of each row of logits, one kernel each on a CPU."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec.ops.cpu import sampling as cpu_sampling
from dispec.ops.cpu.library import has_kernels
from dispec.ops.registration import register


def argmax(logits: Float[Tensor, "R V"]) -> Int[Tensor, "R"]:
    """Return the column of each row's largest logit, the first of several; NaN counts as the largest."""
    if logits.device.type == "cpu" and has_kernels():
        return torch.ops.dispec.argmax(logits)
    return logits.argmax(dim=-1)


def has_sample_kernel(device: torch.device) -> bool:
    """Return whether `sample` takes tensors of the device."""
    return device.type == "cpu" and has_kernels()


def sample(
    logits: Float[Tensor, "R V"],
    temperature: Float[Tensor, "R"],
    seed: Int[Tensor, "R"],
    position: Int[Tensor, "R"],
    token_ids: Int[Tensor, "V"] | None,
) -> Int[Tensor, "R"]:
    """Sample a column of each row as `layers.sampling.sample` defines it; only where `has_sample_kernel`.

    The argmax of logits / temperature + Gumbel noise of the counter (seed, position, token); the plain argmax where the
    temperature is 0. token_ids: the tokens of the columns, None for all tokens in order. A row's result depends on that
    row alone.
    """
    return torch.ops.dispec.sample(logits, temperature, seed, position, token_ids)


def _fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


register("argmax(Tensor logits) -> Tensor", _fake, cpu=cpu_sampling.argmax)
register(
    "sample(Tensor logits, Tensor temperature, Tensor seed, Tensor position, Tensor? token_ids) -> Tensor",
    _fake,
    cpu=cpu_sampling.sample,
)
