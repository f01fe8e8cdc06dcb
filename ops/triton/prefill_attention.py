"""Attention of any number of queries per sequence over pages: prefill, chunked prefill and mixed steps.

FlashAttention-2 (Dao, 2023) with the tiles of all sequences laid end to end: the launch covers an upper bound
of their number that follows from shapes alone, and each program finds its sequence by binary search.
"""

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.triton.online_softmax import attend
from dispec.ops.triton.tuning import PREFILL, PrefillConfig, describe


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
    """One program: up to BLOCK_M // GROUP tokens of one sequence, with all query heads of one key head.

    Grid (KV, T // (BLOCK_M // GROUP) + B). Row r is query head r % GROUP of token r // GROUP. Sequence b's
    tiles begin at number query_start[b] // TOKENS + b, which leaves every sequence at least as many numbers as
    it has tiles; programs with a number to spare return.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    # The last tiles of a sequence see most of it: they start first, so that short ones fill the end.
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

    # Token t of the sequence's queries sees the cached prefix and the queries up to and including itself.
    prefix = context_len - query_len
    visible = tl.minimum(prefix + token + 1, context_len)
    seen_by_all = tl.maximum(prefix + first_token + 1, 0) // BLOCK_N
    seen_by_any = tl.maximum(prefix + tl.minimum(first_token + TOKENS, query_len), 0)
    table = block_tables + sequence.to(tl.int64) * table_stride
    keys += kv_head.to(tl.int64) * key_head_stride
    values += kv_head.to(tl.int64) * value_head_stride

    accumulator = tl.zeros([BLOCK_M, D_PADDED], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator, maximum, total = attend(
        accumulator,
        maximum,
        total,
        query_tile,
        keys,
        values,
        table,
        0,
        seen_by_all,
        visible,
        context_len,
        key_block_stride,
        value_block_stride,
        score_scale,
        D,
        D_PADDED,
        BLOCK_SIZE,
        BLOCK_N,
        False,
    )
    accumulator, maximum, total = attend(
        accumulator,
        maximum,
        total,
        query_tile,
        keys,
        values,
        table,
        seen_by_all,
        tl.cdiv(seen_by_any, BLOCK_N),
        visible,
        context_len,
        key_block_stride,
        value_block_stride,
        score_scale,
        D,
        D_PADDED,
        BLOCK_SIZE,
        BLOCK_N,
        True,
    )
    result = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
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
    """`ops.paged_attention` where sequences have any number of queries, 0 included.

    query: [T, H, D]; keys: [NB, KV, D, BS]; values: [NB, KV, BS, D]; block_tables: [B, P] int32; query_start:
    [B + 1] int32; context_lens: [B] int32. Returns [T, H, D], contiguous, in the dtype of the query; rows at or
    past query_start[B] are not written. `config` replaces what the table would choose, for tests and tuning.
    """
    num_tokens, num_heads, head_dim = query.shape
    batch = block_tables.shape[0]
    kv_heads, block_size = keys.shape[1], keys.shape[3]
    output = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    if num_tokens == 0 or batch == 0:
        return output
    padded = triton.next_power_of_2(head_dim)
    group = num_heads // kv_heads
    if config is None:
        device = describe(query.device)
        wide, narrow = PREFILL[device.architecture][padded, query.element_size()]
        # Twice: tiles for one and a half rounds of the device would leave a quarter of it idle.
        fills = num_tokens * num_heads >= 2 * wide.block_m * device.multiprocessors
        config = wide if fills else narrow
    block_m = max(config.block_m, triton.next_power_of_2(group))
    prefill_kernel[(kv_heads, num_tokens // (block_m // group) + batch)](
        output,
        query,
        keys,
        values,
        block_tables,
        query_start,
        context_lens,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        block_tables.stride(0),
        batch,
        scale * math.log2(math.e),
        H=num_heads,
        GROUP=group,
        D=head_dim,
        D_PADDED=padded,
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return output
