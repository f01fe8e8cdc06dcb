"""Attention over a paged KV cache: one op for ragged prefill, decode and verification.

CUDA runs the Triton kernels of `ops.triton.paged_attention`. On CPU, the kernels of `ops.cpu.attention` read sequences
straight from their pages, one those with few query tokens, one those with many; where the latter cannot be had, the
pages are gathered for torch's own attention.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dispec.ops.cpu import attention as cpu_attention
from dispec.ops.kv_cache import pages_of_layer
from dispec.ops.tracing import constant

_library = torch.library.Library("dispec", "FRAGMENT")
_library.define(
    "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor block_tables, Tensor query_start,"
    " Tensor context_lens, SymInt? query_len, float scale, int? layer=None) -> Tensor"
)

# What the Triton kernels have launch configurations for; the CPU takes any.
TRITON_HEAD_DIMS = (64, 80, 96, 128, 256)

# Up to how many query tokens a sequence is decoded rather than prefilled: with our prefill, and with torch's.
_FEW_QUERIES, _FEW_QUERIES_GATHERED = 16, 256


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

    Sequence b's queries are rows `query_start[b] : query_start[b+1]`, at positions that end at
    `context_lens[b] - 1`; position p lives in page `block_tables[b, p // BS]` at offset `p % BS`. H must be a
    multiple of KV; query head h reads key head `h // (H // KV)`. What lies at or past a sequence's context
    length is never read into the result, not even if it is NaN. Rows of a sequence with context 0 come out zero,
    rows at or past `query_start[B]` are unspecified.

    `query_len` 1…16 promises that every sequence has exactly that many queries (T = B * query_len);
    None promises nothing. The softmax and both sums are in float32. `scale` multiplies the scores. layer: as in
    `ops.write_kv`.
    """
    return torch.ops.dispec.paged_attention(
        query, keys, values, block_tables, query_start, context_lens, query_len, scale, layer
    )


@constant
def has_cpu_kernel(dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    """Whether caches of this kind are read in place on CPU, in steps of any shape."""
    return cpu_attention.has_kernels(dtype, head_dim, block_size)


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
    longest = 0
    if cpu_attention.has_kernels(keys.dtype, keys.shape[2], block_size):
        has_prefill = cpu_attention.has_prefill(keys.dtype)
        longest = _FEW_QUERIES if has_prefill else _FEW_QUERIES_GATHERED
        case = (query, keys, values, block_tables, query_start, context_lens, longest, scale, output)
        cpu_attention.paged_attention(*case)
        if query_len is not None and query_len <= longest:
            return output
        if has_prefill:
            cpu_attention.prefill_attention(*case)
            return output
    starts, contexts = query_start.tolist(), context_lens.tolist()
    for sequence, context in enumerate(contexts):
        start, end = starts[sequence], starts[sequence + 1]
        if end - start <= longest:
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
    """Causal attention of the last tokens of one sequence: query [q, H, D], key and value [KV, context, D]."""
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
    from dispec.ops.triton.paged_attention import paged_attention as kernel

    keys, values = pages_of_layer(keys, values, layer)
    return kernel(query, keys, values, block_tables, query_start, context_lens, query_len, scale)


def _paged_attention_fake(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_library.impl("paged_attention", _paged_attention_cpu, "CPU")
_library.impl("paged_attention", _paged_attention_cuda, "CUDA")
torch.library.register_fake("dispec::paged_attention", _paged_attention_fake, lib=_library)
