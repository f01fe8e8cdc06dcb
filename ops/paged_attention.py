"""Attention over a paged KV cache: one op for prefill, chunked prefill, decode and verification.

CUDA runs the Triton kernels of `ops.triton.decode_attention` and `ops.triton.prefill_attention`; instead of the latter
Hopper GPUs run `ops.cuda.prefill_attention`. On a CPU the C++ kernels read sequences straight from their pages; without
a prefill kernel, pages are gathered for torch's own attention.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dispec.ops.cpu import attention as cpu_attention
from dispec.ops.kv_cache import pages_of_layer
from dispec.ops.registration import register

# Head dimensions that the Triton kernels have launch configurations for; a CPU takes any.
TRITON_HEAD_DIMS = (64, 80, 96, 128, 256)


def paged_attention(
    query: Float[Tensor, "T H D"],
    keys: Shaped[Tensor, "*L NB KV DP BS"],
    values: Shaped[Tensor, "*L NB KV BS DP"],
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
        from dispec.ops.cuda import prefill_attention as hopper
        from dispec.ops.triton.prefill_attention import prefill

        if hopper.has_kernel(query, keys, values):
            return hopper.prefill(query, keys, values, block_tables, query_start, context_lens, scale)
        return prefill(query, keys, values, block_tables, query_start, context_lens, scale)
    from dispec.ops.triton.decode_attention import decode

    return decode(query, keys, values, block_tables, context_lens, query_len, scale)


register(
    "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor block_tables, Tensor query_start,"
    " Tensor context_lens, SymInt? query_len, float scale, int? layer=None) -> Tensor",
    lambda query, *_: torch.empty_like(query, memory_format=torch.contiguous_format),
    cpu=cpu_attention.paged_attention,
    cuda=_paged_attention_cuda,
)
