"""Attention over pages and writes to pages: see decode_attention.cpp, prefill_attention.cpp and rope_write.cpp."""

import torch
from torch import Tensor

from dispec.ops.cpu.library import DTYPE_NAMES, address, has_kernels, has_packed_linear, int32, kernel


def supports_cache(dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    """Return whether the kernels take KV caches of this kind."""
    return (
        dtype in DTYPE_NAMES
        and all(size % 16 == 0 and size <= 256 for size in (head_dim, block_size))
        and has_kernels()
    )


def has_prefill(dtype: torch.dtype) -> bool:
    """Return whether `paged_attention` computes sequences of any number of query tokens; `supports_cache` must hold."""
    return dtype is torch.bfloat16 and has_packed_linear()  # both need AVX512-BF16 or AVX2


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_decode_len: int,
    scale: float,
    output: Tensor,
) -> None:
    """Compute `ops.paged_attention` into `output` [T, H, D].

    Sequences of up to `max_decode_len` query tokens take the decode kernel. Longer ones take the prefill kernel where
    `has_prefill`; elsewhere their rows of `output` are not written.
    """
    if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        query = query.contiguous()
    block_tables, query_start, context_lens = map(int32, (block_tables, query_start, context_lens))
    _, kv_heads, head_dim, block_size = keys.shape
    kernel("paged_attention", keys.dtype)(
        query.data_ptr(),
        query.stride(0),
        keys.data_ptr(),
        values.data_ptr(),
        block_tables.data_ptr(),
        block_tables.stride(0),
        query_start.data_ptr(),
        context_lens.data_ptr(),
        len(context_lens),
        max_decode_len,
        query.shape[1],
        kv_heads,
        head_dim,
        block_size,
        scale,
        output.data_ptr(),
    )


def rope_write(
    projected: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute `ops.rope_write`; returns the queries [T, H, D]."""
    slot_mapping = int32(slot_mapping)
    if projected.stride(1) != 1:
        projected = projected.contiguous()
    cosine, sine = cosine.contiguous(), sine.contiguous()
    _, kv_heads, head_dim, block_size = keys.shape
    num_tokens, size = projected.shape
    heads = size // head_dim - 2 * kv_heads
    query = torch.empty(num_tokens, heads, head_dim, dtype=projected.dtype)
    kernel("rope_write", keys.dtype)(
        projected.data_ptr(),
        projected.stride(0),
        address(query_norm),
        address(key_norm),
        eps,
        cosine.data_ptr(),
        sine.data_ptr(),
        slot_mapping.data_ptr(),
        num_tokens,
        heads,
        kv_heads,
        head_dim,
        block_size,
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
    )
    return query
