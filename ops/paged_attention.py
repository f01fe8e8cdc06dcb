"""Attention over a paged KV cache: one op for ragged prefill, decode and verification.

CUDA runs the Triton kernels of `ops.triton.paged_attention`. On CPU a compiled uniform step inlines
`_uniform_attention`, whose page gathers Inductor fuses into the reductions that read them, six to eight times
faster than gathering first; everything else goes through the registered op, which gathers each sequence's
pages once and calls torch's own attention.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_library = torch.library.Library("dispec", "FRAGMENT")
_library.define(
    "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor block_tables, Tensor query_start,"
    " Tensor context_lens, int? query_len, float scale) -> Tensor"
)

MAX_UNIFORM_QUERY_LEN = 16


def paged_attention(
    query: Float[Tensor, "T H D"],
    keys: Float[Tensor, "NB KV D BS"],
    values: Float[Tensor, "NB KV BS D"],
    block_tables: Int[Tensor, "B P"],
    query_start: Int[Tensor, "B+1"],
    context_lens: Int[Tensor, "B"],
    query_len: int | None,
    scale: float,
) -> Float[Tensor, "T H D"]:
    """Attend from each sequence's last tokens to all its tokens before and including them (causal).

    Sequence b's queries are rows `query_start[b] : query_start[b+1]`, at positions that end at
    `context_lens[b] - 1`; position p lives in page `block_tables[b, p // BS]` at offset `p % BS`. H must be a
    multiple of KV; query head h reads key head `h // (H // KV)`. What lies at or past a sequence's context
    length is never read into the result, not even if it is NaN. Rows at or past `query_start[B]`, and rows of a
    sequence with context 0, come out zero.

    `query_len` 1…16 promises that every sequence has exactly that many queries (T = B * query_len);
    None promises nothing. The softmax and both sums are in float32. `scale` multiplies the scores.
    """
    if query_len is not None and query.device.type == "cpu" and torch.compiler.is_compiling():
        return _uniform_attention(query, keys, values, block_tables, context_lens, query_len, scale)
    return torch.ops.dispec.paged_attention(
        query, keys, values, block_tables, query_start, context_lens, query_len, scale
    )
