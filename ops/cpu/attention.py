"""Attention over pages and writes to pages: see decode_attention.cpp, prefill_attention.cpp and rope_write.cpp."""

import torch
from einops import rearrange
from torch import Tensor

from dispec.ops.cpu.library import CACHE_TYPES, DTYPE_NAMES, address, has_kernels, has_packed_linear, int32, kernel
from dispec.ops.kv_cache import LARGEST_CODE, codes_and_scales, pages_of_layer, scale_rows
from dispec.ops.registration import assume_constant_result

# Most query tokens of a sequence that the decode kernel computes, with our prefill kernel and with torch's attention.
_MAX_DECODE_LEN, _MAX_DECODE_LEN_BEFORE_TORCH = 16, 256


@assume_constant_result
def has_cpu_kernel(dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    """Return whether the kernels read and write KV caches of a dtype and sizes in place, in steps of any shape.

    The dtype of the activations is that of the cache or, where it is quantised, bfloat16 or float32.
    """
    sizes = (head_dim, block_size)
    return (
        (dtype in DTYPE_NAMES or dtype in CACHE_TYPES)
        and all(size % 16 == 0 and size <= 256 for size in sizes)
        and has_kernels()
    )


def has_prefill(dtype: torch.dtype) -> bool:
    """Return whether the kernels compute queries of a dtype in any number; `has_cpu_kernel` must hold."""
    return dtype is torch.bfloat16 and has_packed_linear()  # both need AVX512-BF16 or AVX2


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    query_len: int | None,
    scale: float,
    layer: int | None = None,
) -> Tensor:
    """Compute `ops.paged_attention`, without a kernel on gathered pages with torch's attention."""
    keys, values = pages_of_layer(keys, values, layer)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    head_dim, block_size = keys.shape[-2] - scale_rows(keys.dtype), keys.shape[3]
    max_decode_len = 0
    if has_cpu_kernel(keys.dtype, head_dim, block_size):
        max_decode_len = _MAX_DECODE_LEN if has_prefill(query.dtype) else _MAX_DECODE_LEN_BEFORE_TORCH
        _call_kernel(query, keys, values, block_tables, query_start, context_lens, max_decode_len, scale, output)
        if has_prefill(query.dtype) or (query_len is not None and query_len <= max_decode_len):
            return output
    starts, contexts = query_start.tolist(), context_lens.tolist()
    for sequence, context in enumerate(contexts):
        start, end = starts[sequence], starts[sequence + 1]
        if end - start <= max_decode_len:
            continue
        if context == 0:
            output[start:end] = 0
            continue
        blocks = block_tables[sequence, : -(-context // block_size)].long()
        k, v = _gather(keys, values, blocks, query.dtype)
        k = rearrange(k, "p kv d bs -> kv (p bs) d")[:, :context]
        v = rearrange(v, "p kv bs d -> kv (p bs) d")[:, :context]
        output[start:end] = _attend(query[start:end], k, v, scale)
    return output


def _gather(keys: Tensor, values: Tensor, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return some blocks, dequantised if the cache is quantised."""
    if keys.dtype not in LARGEST_CODE:
        return keys[blocks], values[blocks]
    (keys, key_scales), (values, value_scales) = codes_and_scales(keys, values)
    k = keys[blocks].float() * key_scales[blocks][:, :, None]
    v = values[blocks].float() * value_scales[blocks][..., None]
    return k.to(dtype), v.to(dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend causally from the last tokens of one sequence. query: [q, H, D]; key and value: [KV, context, D]."""
    queries, context = query.shape[0], key.shape[1]
    q = rearrange(query, "q h d -> 1 h q d")
    mask = None
    if 1 < queries < context:
        mask = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)
    attended = torch.nn.functional.scaled_dot_product_attention(
        q, key[None], value[None], attn_mask=mask, is_causal=queries == context, scale=scale, enable_gqa=True
    )
    return rearrange(attended, "1 h q d -> q h d")


def _call_kernel(
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
    """Write `output` for sequences of up to `max_decode_len` query tokens, and where `has_prefill` for the others."""
    if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        query = query.contiguous()
    block_tables, query_start, context_lens = map(int32, (block_tables, query_start, context_lens))
    kernel("paged_attention", query.dtype)(
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
        *_layout(keys),
        scale,
        output.data_ptr(),
    )


def _layout(keys: Tensor) -> tuple[int, int, int, int]:
    """Return the number of key heads, the head dimension, the block size and the `CacheType` of a layer's pages."""
    _, kv_heads, rows, block_size = keys.shape
    return kv_heads, rows - scale_rows(keys.dtype), block_size, CACHE_TYPES.get(keys.dtype, 0)


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
    layer: int | None = None,
) -> Tensor:
    """Compute `ops.rope_write`; return the queries [T, H, D]."""
    keys, values = pages_of_layer(keys, values, layer)
    slot_mapping = int32(slot_mapping)
    if projected.stride(1) != 1:
        projected = projected.contiguous()
    cosine, sine = cosine.contiguous(), sine.contiguous()
    kv_heads, head_dim, *_ = layout = _layout(keys)
    num_tokens, size = projected.shape
    heads = size // head_dim - 2 * kv_heads
    query = torch.empty(num_tokens, heads, head_dim, dtype=projected.dtype)
    kernel("rope_write", projected.dtype)(
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
        *layout,
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
    )
    return query
