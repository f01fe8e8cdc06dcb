"""Sampling from logits: see sampling.cpp. torch's argmax of bf16 takes 20 times as long."""

import torch
from torch import Tensor

from dispec.ops.cpu.library import DTYPE_NAMES, address, has_kernels, int32, kernel


def argmax(logits: Tensor) -> Tensor:
    """Compute `ops.argmax`."""
    if not has_kernels() or logits.dtype not in DTYPE_NAMES or logits.stride(1) != 1:
        return logits.argmax(dim=-1)
    output = torch.empty(len(logits), dtype=torch.int64)
    kernel("argmax", logits.dtype)(logits.data_ptr(), logits.stride(0), *logits.shape, output.data_ptr())
    return output


def sample(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, token_ids: Tensor | None) -> Tensor:
    """Compute `ops.sample`."""
    if logits.dtype not in DTYPE_NAMES:
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    temperature, seed, position = temperature.float().contiguous(), seed.long().contiguous(), int32(position)
    if token_ids is not None:
        token_ids = token_ids.long().contiguous()
    output = torch.empty(len(logits), dtype=torch.int64)
    kernel("sample", logits.dtype)(
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        temperature.data_ptr(),
        seed.data_ptr(),
        position.data_ptr(),
        address(token_ids),
        output.data_ptr(),
    )
    return output
