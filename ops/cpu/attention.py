"""Attention over pages, and filling those pages: see the C++ files."""

from collections.abc import Callable

import torch
from torch import Tensor

from dispec.ops.cpu.library import library

_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def has_kernels(dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    """Whether caches of this kind can be attended to."""
    sizes = (head_dim, block_size)
    return dtype in _NAMES and all(size % 16 == 0 and size <= 256 for size in sizes) and library() is not None


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    longest: int,
    scale: float,
    output: Tensor,
) -> None:
    """As `ops.paged_attention` into `output` [T, H, D], for sequences of at most `longest` query tokens."""
    kernel = getattr(library(), f"dispec_paged_attention_{_NAMES[keys.dtype]}")
    _attend(kernel, query, keys, values, block_tables, query_start, context_lens, longest, scale, output)


def has_prefill(dtype: torch.dtype) -> bool:
    """Whether `prefill_attention` can attend to caches of that type; `has_kernels` tells the rest."""
    return dtype is torch.bfloat16 and hasattr(library(), "dispec_prefill_attention")


def prefill_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    longest: int,
    scale: float,
    output: Tensor,
) -> None:
    """As `ops.paged_attention` into `output` [T, H, D], for sequences of more than `longest` query tokens."""
    kernel = library().dispec_prefill_attention  # type: ignore[union-attr]
    _attend(kernel, query, keys, values, block_tables, query_start, context_lens, longest, scale, output)


def _attend(
    kernel: Callable[..., None],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    longest: int,
    scale: float,
    output: Tensor,
) -> None:
    query = _dense(query)
    block_tables, query_start, context_lens = map(int32, (block_tables, query_start, context_lens))
    _, kv_heads, head_dim, block_size = keys.shape
    kernel(
        query.data_ptr(),
        query.stride(0),
        keys.data_ptr(),
        values.data_ptr(),
        block_tables.data_ptr(),
        block_tables.stride(0),
        query_start.data_ptr(),
        context_lens.data_ptr(),
        len(context_lens),
        longest,
        query.shape[1],
        kv_heads,
        head_dim,
        block_size,
        scale,
        output.data_ptr(),
    )


def write_kv(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
    """As `ops.write_kv`."""
    key, value, slot_mapping = _dense(key), _dense(value), int32(slot_mapping)
    _, kv_heads, head_dim, block_size = keys.shape
    getattr(library(), f"dispec_write_kv_{_NAMES[keys.dtype]}")(
        keys.data_ptr(),
        values.data_ptr(),
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        slot_mapping.data_ptr(),
        len(slot_mapping),
        kv_heads,
        head_dim,
        block_size,
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
    """As `ops.rope_write`."""
    slot_mapping = int32(slot_mapping)
    if projected.stride(1) != 1:
        projected = projected.contiguous()
    _, kv_heads, head_dim, block_size = keys.shape
    tokens, size = projected.shape
    heads = size // head_dim - 2 * kv_heads
    query = torch.empty(tokens, heads, head_dim, dtype=projected.dtype)
    getattr(library(), f"dispec_rotate_and_write_{_NAMES[keys.dtype]}")(
        projected.data_ptr(),
        projected.stride(0),
        None if query_norm is None else query_norm.data_ptr(),
        None if key_norm is None else key_norm.data_ptr(),
        eps,
        cosine.contiguous().data_ptr(),
        sine.contiguous().data_ptr(),
        slot_mapping.data_ptr(),
        tokens,
        heads,
        kv_heads,
        head_dim,
        block_size,
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
    )
    return query


def _dense(x: Tensor) -> Tensor:
    """Tokens may lie apart; within one, all is in a row."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def int32(x: Tensor) -> Tensor:
    """Integers as the kernels read them."""
    return x if x.dtype is torch.int32 and x.stride(-1) == 1 else x.int().contiguous()
