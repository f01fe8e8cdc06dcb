"""Attention over a paged KV cache: one op for prefill, chunked prefill, decode and verification.

CUDA runs the Triton kernels of `ops.triton.decode_attention` and `ops.triton.prefill_attention`. On a CPU the C++
kernels read sequences straight from their pages; without a prefill kernel, pages are gathered for torch's own
attention.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dispec.ops.cpu import attention as cpu_attention
from dispec.ops.kv_cache import pages_of_layer
from dispec.ops.registration import assume_constant_result, register

# Head dimensions that the Triton kernels have launch configurations for; a CPU takes any.
TRITON_HEAD_DIMS = (64, 80, 96, 128, 256)

# Most query tokens of a sequence that the decode kernel computes, with our prefill kernel and with torch's attention.
_MAX_DECODE_LEN, _MAX_DECODE_LEN_BEFORE_TORCH = 16, 256


def paged_attention(
    query: Float[Tensor, "T H D"],
    keys: Float[Tensor, "*L NB KV D BS"],
    values: Float[Tensor, "*L NB KV BS D"],
    block_tables: Int[Tensor, "B P"],
    query_start: Int[Tensor, "B+1"],
    context_lens: Int[Tensor, "B"],
    query_len: int | None,
    scale: float,
    layer: int | None = None,
) -> Float[Tensor, "T H D"]:
    """Attend from each sequence's last tokens to all its tokens before and including them (causal).

    Sequence b's queries are rows `query_start[b] : query_start[b+1]`, at positions that end at `context_lens[b] - 1`;
    position p is in block `block_tables[b, p // BS]` at offset `p % BS`. H must be a multiple of KV; query head h reads
    key head `h // (H // KV)`. Keys and values at or past a sequence's context length do not affect the result, even if
    they are NaN. Rows of a sequence with context 0 are zero; rows at or past `query_start[B]` are unspecified.

    query_len: 1 to 16 where every sequence has exactly that many queries (T = B * query_len), None where numbers
    differ. scale multiplies the scores. Softmax and sums are in float32. layer: as in `ops.write_kv`.
    """
    return torch.ops.dispec.paged_attention(
        query, keys, values, block_tables, query_start, context_lens, query_len, scale, layer
    )


@assume_constant_result
def has_cpu_kernel(dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    """Return whether a CPU reads KV caches of this kind in place, in steps of any shape."""
    return cpu_attention.supports_cache(dtype, head_dim, block_size)


def _paged_attention_cpu(
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
    keys, values = pages_of_layer(keys, values, layer)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    block_size = keys.shape[3]
    max_decode_len = 0
    if cpu_attention.supports_cache(keys.dtype, keys.shape[2], block_size):
        has_prefill = cpu_attention.has_prefill(keys.dtype)
        max_decode_len = _MAX_DECODE_LEN if has_prefill else _MAX_DECODE_LEN_BEFORE_TORCH
        cpu_attention.paged_attention(
            query, keys, values, block_tables, query_start, context_lens, max_decode_len, scale, output
        )
        if has_prefill or (query_len is not None and query_len <= max_decode_len):
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
        k = rearrange(keys[blocks], "p kv d bs -> kv (p bs) d")[:, :context]
        v = rearrange(values[blocks], "p kv bs d -> kv (p bs) d")[:, :context]
        output[start:end] = _attend(query[start:end], k, v, scale)
    return output


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


def _paged_attention_cuda(
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
    keys, values = pages_of_layer(keys, values, layer)
    if query_len is None:
        from dispec.ops.triton.prefill_attention import prefill

        return prefill(query, keys, values, block_tables, query_start, context_lens, scale)
    from dispec.ops.triton.decode_attention import decode

    return decode(query, keys, values, block_tables, context_lens, query_len, scale)


register(
    "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor block_tables, Tensor query_start,"
    " Tensor context_lens, SymInt? query_len, float scale, int? layer=None) -> Tensor",
    lambda query, *_: torch.empty_like(query, memory_format=torch.contiguous_format),
    cpu=_paged_attention_cpu,
    cuda=_paged_attention_cuda,
)
