"""Attention of any number of queries per sequence over pages: prefill, chunked prefill and mixed steps.

FlashAttention-2 (Dao, 2023) over the tiles of all sequences, numbered end to end. The launch covers an upper bound of
their number, which follows from shapes alone; each program finds its sequence by binary search.
"""

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.kv_cache import LARGEST_CODE
from dispec.ops.triton.online_softmax import attend, shape_constants, strides
from dispec.ops.triton.tuning import MIN_QUANTIZED_TILE, PREFILL, PrefillConfig, describe, element_bytes


@triton.jit(do_not_specialize=["table_stride", "num_sequences"])
@no_type_check
def prefill_kernel(
    output,
    query,
    keys,
    values,
    block_tables,
    query_start,
    context_lens,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_head_stride,
    value_block_stride,
    value_head_stride,
    table_stride,
    num_sequences,
    score_scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend from up to TOKENS = BLOCK_M // GROUP tokens of one sequence, for all query heads of one key head.

    Grid (KV, T // TOKENS + B). Row r is query head r % GROUP of token r // GROUP. Sequence b's tiles have numbers from
    query_start[b] // TOKENS + b on, at least as many as it has tiles; programs of the remaining numbers return.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    # The last tiles of a sequence see most positions. They start first, so that short ones fill the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)

    low = tl.program_id(0) * 0
    high = low + num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    sequence = low - 1

    first_row = tl.load(query_start + sequence)
    query_len = tl.load(query_start + sequence + 1) - first_row
    first_token = (tile - (first_row // TOKENS + sequence)) * TOKENS
    if first_token >= query_len:
        return
    context_len = tl.load(context_lens + sequence)

    row = tl.arange(0, BLOCK_M)
    token = first_token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    dim = tl.arange(0, D_PADDED)
    in_tile = (row < TOKENS * GROUP) & (token < query_len)
    in_query = in_tile[:, None] & (dim < D)[None, :]
    row_index = (first_row + token).to(tl.int64)
    query_rows = row_index * query_token_stride + head * query_head_stride
    query_tile = tl.load(query + query_rows[:, None] + dim[None, :], mask=in_query, other=0.0)

    # A token sees the cached prefix, the queries before it and itself.
    prefix = context_len - query_len
    visible = tl.minimum(prefix + token + 1, context_len)
    seen_by_all = tl.maximum(prefix + first_token + 1, 0) // BLOCK_N
    seen_by_any = tl.maximum(prefix + tl.minimum(first_token + TOKENS, query_len), 0)
    table = block_tables + sequence.to(tl.int64) * table_stride
    keys += kv_head.to(tl.int64) * key_head_stride
    values += kv_head.to(tl.int64) * value_head_stride

    result, _, _ = attend(
        query_tile, keys, values, table,
        0, seen_by_all, seen_by_all, tl.cdiv(seen_by_any, BLOCK_N),
        visible, context_len, key_block_stride, value_block_stride, score_scale,
        D, D_PADDED, BLOCK_SIZE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    output_rows = (row_index * H + head) * D
    tl.store(output + output_rows[:, None] + dim[None, :], result.to(output.dtype.element_ty), mask=in_query)


def prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Compute `ops.paged_attention` of a step in which sequences have any number of queries, 0 included.

    query: [T, H, D]; keys: [NB, KV, D, BS]; values: [NB, KV, BS, D]; block_tables: [B, P] int32; query_start:
    [B + 1] int32; context_lens: [B] int32. Strides as in `decode`. Returns [T, H, D], contiguous, in the dtype of the
    query; rows at or past query_start[B] are not written. config: replaces the table's choice in tests and tuning.
    """
    num_tokens, num_heads, _ = query.shape
    batch = block_tables.shape[0]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_tokens == 0 or batch == 0:
        return output
    shape = shape_constants(query, keys)
    if config is None:
        device = describe(query.device)
        wide, narrow = PREFILL[device.architecture][shape["D_PADDED"], element_bytes(query.dtype, keys.dtype)]
        # Twice: tiles for one and a half rounds of the device would leave a quarter of it idle.
        fills = num_tokens * num_heads >= 2 * wide.block_m * device.multiprocessors
        config = wide if fills else narrow
    if keys.dtype in LARGEST_CODE:
        config = config._replace(block_n=max(config.block_n, MIN_QUANTIZED_TILE))
    block_m = max(config.block_m, triton.next_power_of_2(shape["GROUP"]))
    prefill_kernel[(keys.shape[1], num_tokens // (block_m // shape["GROUP"]) + batch)](
        output,
        query,
        keys,
        values,
        block_tables,
        query_start,
        context_lens,
        *strides(query, keys, values, block_tables),
        batch,
        scale * math.log2(math.e),
        **shape,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return output
