"""Attention over a paged KV cache on CUDA: the uniform path and the ragged path."""

from torch import Tensor

from dispec.ops.triton.decode_attention import decode
from dispec.ops.triton.prefill_attention import prefill


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    query_len: int | None,
    scale: float,
) -> Tensor:
    """Attend as `ops.paged_attention.paged_attention` says, except that rows at or past query_start[B] are left
    unwritten.

    query: [T, H, D], strided at will but for contiguous D; keys: [NB, KV, D, BS] and values: [NB, KV, BS, D],
    contiguous in their last two dimensions; block_tables: [B, P], query_start: [B + 1] and context_lens: [B],
    int32. Launches on the current device and reads nothing back: safe to capture in a CUDA graph once it has
    run with the same shapes.
    """
    if query_len is None:
        return prefill(query, keys, values, block_tables, query_start, context_lens, scale)
    return decode(query, keys, values, block_tables, context_lens, query_len, scale)
