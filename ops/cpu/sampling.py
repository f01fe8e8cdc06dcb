"""Sampling from logits: see sampling.cpp. torch's argmax of bf16 takes 20 times as long."""

import torch
from torch import Tensor

from dispec.ops.cpu.library import DTYPE_NAMES, address, has_kernels, int32, kernel


def mask_tokens(logits: Tensor, allowed: Tensor) -> None:
    """Compute `ops.mask_tokens`."""
    if not has_kernels() or logits.dtype not in DTYPE_NAMES or logits.stride(1) != 1:
        fill_masked(logits, allowed)
        return
    kernel("mask_tokens", logits.dtype)(logits.data_ptr(), logits.stride(0), *logits.shape, allowed.data_ptr())


def fill_masked(logits: Tensor, allowed: Tensor) -> None:
    """Compute `ops.mask_tokens` with torch's operations on any device."""
    bits = (allowed[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    logits.masked_fill_(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def argmax(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Compute `ops.argmax`."""
    if not has_kernels() or logits.dtype not in DTYPE_NAMES or logits.stride(1) != 1:
        if allowed is not None:
            logits = logits.clone()
            fill_masked(logits, allowed)
        return logits.argmax(dim=-1)
    output = torch.empty(len(logits), dtype=torch.int64)
    kernel("argmax", logits.dtype)(
        logits.data_ptr(), logits.stride(0), *logits.shape, address(allowed), output.data_ptr()
    )
    return output


def sample(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    token_ids: Tensor | None,
    allowed: Tensor | None = None,
) -> Tensor:
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
        address(allowed),
        output.data_ptr(),
    )
    return output
