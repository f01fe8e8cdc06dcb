"""Drawn tokens: see sampling.cpp. Of torch's functions it takes a dozen passes over the vocabulary."""

import torch
from torch import Tensor

from dispec.ops.cpu.attention import int32
from dispec.ops.cpu.library import library

_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def sample(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, token_ids: Tensor | None) -> Tensor:
    """As `ops.sample`."""
    kernels = library()
    assert kernels is not None
    if logits.dtype not in _NAMES:
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    temperature, seed, position = temperature.float().contiguous(), seed.long().contiguous(), int32(position)
    if token_ids is not None:
        token_ids = token_ids.long().contiguous()
    rows, size = logits.shape
    output = torch.empty(rows, dtype=torch.int64)
    getattr(kernels, f"dispec_sample_{_NAMES[logits.dtype]}")(
        logits.data_ptr(),
        logits.stride(0),
        rows,
        size,
        temperature.data_ptr(),
        seed.data_ptr(),
        position.data_ptr(),
        None if token_ids is None else token_ids.data_ptr(),
        output.data_ptr(),
    )
    return output
