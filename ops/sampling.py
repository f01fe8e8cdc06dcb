"""Masking logits and choosing a token of each row."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec.ops.cpu import sampling as cpu_sampling
from dispec.ops.cpu.library import has_kernels
from dispec.ops.registration import register, returns_nothing


def mask_tokens(logits: Float[Tensor, "R V"], allowed: Int[Tensor, "R W"]) -> None:
    """Set the logits of tokens that are not allowed to -inf, in place.

    allowed: int32 words, W = ceil(V / 32); token v has bit v % 32, counted from the least significant, of word v // 32.
        That is the layout of the token bitmasks of llguidance and xgrammar.
    """
    torch.ops.dispec.mask_tokens(logits, allowed)


def argmax(logits: Float[Tensor, "R V"], allowed: Int[Tensor, "R W"] | None = None) -> Int[Tensor, "R"]:
    """Return the column of each row's largest logit, the first of several; NaN counts as the largest.

    allowed: as in `mask_tokens`, contiguous; only where `has_sample_kernel`. None allows all tokens.
    """
    if logits.is_cuda or (logits.device.type == "cpu" and has_kernels()):
        return torch.ops.dispec.argmax(logits, allowed)
    return logits.argmax(dim=-1)


def has_sample_kernel(device: torch.device) -> bool:
    """Return whether `sample` takes tensors of the device, and `argmax` takes masks."""
    return device.type == "cpu" and has_kernels()


def sample(
    logits: Float[Tensor, "R V"],
    temperature: Float[Tensor, "R"],
    seed: Int[Tensor, "R"],
    position: Int[Tensor, "R"],
    token_ids: Int[Tensor, "V"] | None,
    allowed: Int[Tensor, "R W"] | None = None,
) -> Int[Tensor, "R"]:
    """Sample a column of each row as `layers.sampling.sample` defines it; only where `has_sample_kernel`.

    The argmax of logits / temperature + Gumbel noise of the counter (seed, position, token); the plain argmax where the
    temperature is 0. token_ids: the tokens of the columns, None for all tokens in order. allowed: the columns that may
    be sampled, as in `argmax`. A row's result depends on that row alone.
    """
    return torch.ops.dispec.sample(logits, temperature, seed, position, token_ids, allowed)


def _fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def _argmax_cuda(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    from dispec.ops.triton.argmax import argmax as kernel

    assert allowed is None
    return kernel(logits if logits.stride(1) == 1 else logits.contiguous())


register(
    "mask_tokens(Tensor(a!) logits, Tensor allowed) -> ()",
    returns_nothing,
    cpu=cpu_sampling.mask_tokens,
    cuda=cpu_sampling.fill_masked,
)
register("argmax(Tensor logits, Tensor? allowed=None) -> Tensor", _fake, cpu=cpu_sampling.argmax, cuda=_argmax_cuda)
register(
    "sample(Tensor logits, Tensor temperature, Tensor seed, Tensor position, Tensor? token_ids,"
    " Tensor? allowed=None) -> Tensor",
    _fake,
    cpu=cpu_sampling.sample,
)
