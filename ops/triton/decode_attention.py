"""Attention of a few queries per sequence over pages, with long contexts split over programs.

Flash-decoding (Dao, Haziza, Massa, Sizov, 2023): each program attends to one split of one sequence's context, for all
query heads of one key head, and writes a partial output with the log of its sum of exponentials. A second kernel
combines the partial outputs. The number of programs follows from shapes alone, so that a CUDA graph can be replayed;
the positions of a split follow from the context length on the device.
"""

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.kv_cache import LARGEST_CODE
from dispec.ops.triton.online_softmax import attend, shape_constants, strides
from dispec.ops.triton.overlap import launch_next, overlap_options, wait
from dispec.ops.triton.tuning import (
    DECODE,
    MAX_DECODE_TILE_ROWS,
    MAX_SPLIT_POSITIONS,
    MIN_QUANTIZED_TILE,
    MIN_SPLIT_POSITIONS,
    DecodeConfig,
    describe,
    element_bytes,
)


@triton.jit
@no_type_check
def _split_tiles(context_len, balanced_splits, shortest_split, longest_split, BLOCK_N: tl.constexpr):
    """Return the tiles of a sequence and the tiles of a split. Both kernels need the same."""
    tiles = tl.cdiv(context_len, BLOCK_N)
    return tiles, tl.maximum(tl.minimum(tl.cdiv(tiles, balanced_splits), longest_split), shortest_split)


@triton.jit(do_not_specialize=["table_stride", "balanced_splits", "shortest_split", "longest_split", "num_splits"])
@no_type_check
def decode_kernel(
    output,
    partial_output,
    partial_sum,
    query,
    keys,
    values,
    block_tables,
    context_lens,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_head_stride,
    value_block_stride,
    value_head_stride,
    table_stride,
    balanced_splits,
    shortest_split,
    longest_split,
    num_splits,
    score_scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Attend from up to BLOCK_M (token, head) rows of one sequence and key head to one split.

    Grid (B, KV * ROW_TILES, num_splits). Row r is query head r % GROUP of token r // GROUP. partial_output is
    [T, H, num_splits, D] and partial_sum [T, H, num_splits], both float32 and unused unless SPLIT.
    """
    wait(OVERLAPS)
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1) // ROW_TILES
    split = tl.program_id(2)
    context_len = tl.load(context_lens + sequence)
    tiles, tiles_per_split = _split_tiles(context_len, balanced_splits, shortest_split, longest_split, BLOCK_N)
    first_tile = split * tiles_per_split
    # An empty context still has its rows written, as zeros, by the first split.
    if (first_tile >= tiles) & (split > 0):
        return
    last_tile = tl.minimum(first_tile + tiles_per_split, tiles)

    row = tl.program_id(1) % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    dim = tl.arange(0, D_PADDED)
    row_index = (sequence * QUERY_LEN + token).to(tl.int64)
    in_query = (token < QUERY_LEN)[:, None] & (dim < D)[None, :]
    query_rows = row_index * query_token_stride + head * query_head_stride
    query_tile = tl.load(query + query_rows[:, None] + dim[None, :], mask=in_query, other=0.0)

    visible = tl.minimum(context_len - QUERY_LEN + token + 1, context_len)
    table = block_tables + sequence.to(tl.int64) * table_stride
    keys += kv_head.to(tl.int64) * key_head_stride
    values += kv_head.to(tl.int64) * value_head_stride

    # All tiles are masked: a loop of its own for the last ones would wait for its first pages again.
    result, maximum, total = attend(
        query_tile, keys, values, table,
        first_tile, first_tile, first_tile, last_tile,
        visible, context_len, key_block_stride, value_block_stride, score_scale,
        D, D_PADDED, BLOCK_SIZE, BLOCK_M, BLOCK_N, ALL_MASKED=True,
    )  # fmt: skip
    launch_next(OVERLAPS)
    output_row = row_index * H + head
    if SPLIT:  # noqa: SIM102 (a constant: the whole branch goes away)
        if tiles > tiles_per_split:
            partial_row = output_row * num_splits + split
            tl.store(partial_output + partial_row[:, None] * D + dim[None, :], result, mask=in_query)
            logarithm = tl.where(total == 0.0, float("-inf"), maximum + tl.math.log2(total))
            tl.store(partial_sum + partial_row, logarithm, mask=token < QUERY_LEN)
            return
    tl.store(output + output_row[:, None] * D + dim[None, :], result.to(output.dtype.element_ty), mask=in_query)


@triton.jit(do_not_specialize=["balanced_splits", "shortest_split", "longest_split", "num_splits"])
@no_type_check
def combine_kernel(
    output,
    partial_output,
    partial_sum,
    context_lens,
    balanced_splits,
    shortest_split,
    longest_split,
    num_splits,
    H: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Combine the splits of one row, BLOCK_D of its D values at a time. Grid (T * H, ceil(D / BLOCK_D)).

    Rows of a sequence with a single split are complete already.
    """
    wait(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    context_len = tl.load(context_lens + tl.program_id(0) // (H * QUERY_LEN))
    tiles, tiles_per_split = _split_tiles(context_len, balanced_splits, shortest_split, longest_split, BLOCK_N)
    if tiles <= tiles_per_split:
        return
    splits = tl.cdiv(tiles, tiles_per_split)
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    partial_sum += row * num_splits
    partial_output += row * num_splits * D
    maximum = tl.full([BLOCK_SPLITS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_SPLITS], tl.float32)
    accumulator = tl.zeros([BLOCK_SPLITS, BLOCK_D], tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        logarithm = tl.load(partial_sum + split, mask=split < splits, other=float("-inf"))
        part = tl.load(
            partial_output + split[:, None] * D + dim[None, :],
            mask=(split < splits)[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        new_maximum = tl.maximum(maximum, logarithm)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        rescale = tl.math.exp2(maximum - shift)
        weight = tl.math.exp2(logarithm - shift)
        total = total * rescale + weight
        accumulator = accumulator * rescale[:, None] + part * weight[:, None]
        maximum = new_maximum
    # Each lane keeps its own maximum up to here.
    overall = tl.max(maximum, 0)
    rescale = tl.math.exp2(maximum - tl.where(overall == float("-inf"), 0.0, overall))
    total_of_all = tl.sum(total * rescale, 0)
    result = tl.sum(accumulator * rescale[:, None], 0) / tl.where(total_of_all == 0.0, 1.0, total_of_all)
    tl.store(output + row * D + dim, result.to(output.dtype.element_ty), mask=dim < D)


def plan_splits(
    programs: int, positions: int, block_n: int, wanted_programs: int, forced: int | None = None
) -> tuple[int, int, int, int]:
    """Return (balanced splits, tiles of the shortest and of the longest split, most splits of a context).

    programs: number without splits. positions: most tokens of a context. A sequence has `balanced` equal splits, fewer
    where those would be shorter than the shortest split, and more where they would be longer than the longest.
    """
    tiles = max(triton.cdiv(positions, block_n), 1)
    # With few programs the splits save more than the second kernel takes, however short they are.
    is_small = programs * 8 < wanted_programs
    shortest = 1 if forced or is_small else max(MIN_SPLIT_POSITIONS // block_n, 1)
    longest = tiles if forced else max(MAX_SPLIT_POSITIONS // block_n, 1)
    balanced = min(forced or triton.cdiv(wanted_programs, programs), triton.cdiv(tiles, shortest))
    return balanced, shortest, longest, max(balanced, triton.cdiv(tiles, longest))


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_len: int,
    scale: float,
    num_splits: int | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Compute `ops.paged_attention` of a step in which every sequence has `query_len` queries.

    query: [B * query_len, H, D]; keys: [NB, KV, D, BS]; values: [NB, KV, BS, D]; block_tables: [B, P] int32;
    context_lens: [B] int32. Only D of the query, and the last two dimensions of keys and values, must be contiguous.
    Returns [B * query_len, H, D], contiguous, in the dtype of the query. Nothing is read back to the host, so that a
    CUDA graph can record the launches. num_splits, config: replace the table's choice in tests and tuning.
    """
    num_tokens, num_heads, head_dim = query.shape
    batch, max_blocks_per_seq = block_tables.shape
    output = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    if num_tokens == 0:
        return output
    device, shape = describe(query.device), shape_constants(query, keys)
    config = config or DECODE[device.architecture][shape["D_PADDED"], element_bytes(query.dtype, keys.dtype)]
    if keys.dtype in LARGEST_CODE:
        config = config._replace(block_n=max(config.block_n, MIN_QUANTIZED_TILE))
    rows = query_len * shape["GROUP"]
    block_m = min(max(triton.next_power_of_2(rows), 16), MAX_DECODE_TILE_ROWS[query.element_size()])
    row_tiles = triton.cdiv(rows, block_m)
    balanced, shortest, longest, splits = plan_splits(
        batch * keys.shape[1] * row_tiles,
        max_blocks_per_seq * shape["BLOCK_SIZE"],
        config.block_n,
        device.multiprocessors * config.programs_per_multiprocessor,
        num_splits,
    )
    partial_output = partial_sum = output
    if splits > 1:
        partial_sum = torch.empty((num_tokens, num_heads, splits), dtype=torch.float32, device=query.device)
        partial_output = torch.empty((*partial_sum.shape, head_dim), dtype=torch.float32, device=query.device)
    decode_kernel[(batch, keys.shape[1] * row_tiles, splits)](
        output,
        partial_output,
        partial_sum,
        query,
        keys,
        values,
        block_tables,
        context_lens,
        *strides(query, keys, values, block_tables),
        balanced,
        shortest,
        longest,
        splits,
        scale * math.log2(math.e),
        **shape,
        QUERY_LEN=query_len,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        ROW_TILES=row_tiles,
        SPLIT=splits > 1,
        **overlap_options(query),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        block_d = min(shape["D_PADDED"], 64)
        combine_kernel[(num_tokens * num_heads, triton.cdiv(head_dim, block_d))](
            output,
            partial_output,
            partial_sum,
            context_lens,
            balanced,
            shortest,
            longest,
            splits,
            H=num_heads,
            QUERY_LEN=query_len,
            D=head_dim,
            BLOCK_D=block_d,
            BLOCK_N=config.block_n,
            BLOCK_SPLITS=32 if splits > 16 else 16,
            **overlap_options(query),
            num_warps=4,
            num_stages=2,
        )
    return output
