"""Causal attention of a tile of query rows over pages, in the decode and the prefill kernel.

The running maximum and sum are those of online softmax (Milakov and Gimelshein, 2018) as FlashAttention-2
arranges them (Dao, 2023): the accumulator is divided by the sum only once, at the end. Pages are addressed
through a block table as in PagedAttention (Kwon et al., 2023), directly, without gathering them first.

Pages of one byte an element are quantised (see `ops.kv_cache`). Their codes are read in pairs, as words of 16 bits:
tensor cores want keys and values in another order than pages have them in, and shared memory reorders words as fast as
it is read, but not bytes. A word of keys holds two positions, a word of values two dimensions, so even and odd
positions are products of their own, and so are even and odd dimensions of the output. Codes are exact in 16 bits. A
key's scale multiplies its scores, a value's scale its weights.

`no_type_check` keeps run-time shape checkers from wrapping the kernels: Triton reads their source.
"""

import os
from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

# The interpreter has no inline assembly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
@no_type_check
def _attend_tiles(
    accumulator,
    maximum,
    total,
    query,
    keys,
    values,
    block_table,
    first_tile,
    last_tile,
    visible,
    context_len,
    key_block_stride,
    value_block_stride,
    score_scale,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold tiles `first_tile : last_tile` of BLOCK_N positions into (accumulator, maximum, total).

    With MASKED, row r sees only positions below visible[r], and no value at or past context_len is loaded. Without it,
    every row must see every position of these tiles.
    """
    lane = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, D_PADDED)
    in_head = dim < D
    for tile in range(first_tile, last_tile):
        position = tile * BLOCK_N + lane
        in_context = position < context_len
        offset = position % BLOCK_SIZE
        # One scalar load for each block of the tile, spread over its lanes by selects: a vector load would fetch
        # the same entries once for every thread and position.
        first_entry = block_table + tile * BLOCK_N // BLOCK_SIZE
        block = tl.zeros([BLOCK_N], tl.int32) + tl.load(first_entry)
        for entry in tl.static_range(1, (BLOCK_N + BLOCK_SIZE - 1) // BLOCK_SIZE):
            if MASKED:
                start = tile * BLOCK_N + entry * BLOCK_SIZE
                next_block = tl.load(first_entry + entry, mask=start < context_len, other=0)
            else:
                next_block = tl.load(first_entry + entry)
            block = tl.where(lane // BLOCK_SIZE == entry, next_block, block)
        key_block = block.to(tl.int64) * key_block_stride
        value_block = block.to(tl.int64) * value_block_stride

        # Keys at or past the context are loaded (from block 0, or from the rest of the last block), but their scores
        # are replaced below.
        key_pointers = keys + (key_block + offset)[None, :] + dim[:, None] * BLOCK_SIZE
        key = tl.load(key_pointers) if D == D_PADDED else tl.load(key_pointers, mask=in_head[:, None], other=0.0)
        scores = tl.dot(query, key, input_precision="ieee")
        if MASKED:
            scores = tl.where(position[None, :] < visible[:, None], scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * score_scale)
        # A row that sees no position yet subtracts 0: -inf minus -inf would be NaN.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) if MASKED else new_maximum
        weights = tl.math.exp2(scores * score_scale - shift[:, None])
        rescale = tl.math.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, 1)
        accumulator = accumulator * rescale[:, None]
        maximum = new_maximum

        value_pointers = values + (value_block + offset * D)[:, None] + dim[None, :]
        if MASKED:
            # A weight of 0 times NaN is NaN: values past the context must not be loaded.
            value = tl.load(value_pointers, mask=in_context[:, None] & in_head[None, :], other=0.0)
        elif D == D_PADDED:
            value = tl.load(value_pointers)
        else:
            value = tl.load(value_pointers, mask=in_head[None, :], other=0.0)
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision="ieee")
    return accumulator, maximum, total


@triton.jit
@no_type_check
def _permute(words, assembly: tl.constexpr):
    """Run an instruction on two words at a time. Triton shifts and selects bytes one word at a time."""
    return tl.inline_asm_elementwise(assembly, "=r,r", [words], dtype=tl.uint16, is_pure=True, pack=2)


@triton.jit
@no_type_check
def _codes(words, HIGH: tl.constexpr, IS_INT8: tl.constexpr, dtype: tl.constexpr):
    """Return the low or the high bytes of 16-bit words, codes of int8 or e4m3, in `dtype`.

    Conversion instructions have a quarter of the rate of the others or less. Here the bits of a code become those of
    a number that a sum or a product turns into the code.
    """
    if dtype == tl.bfloat16:
        if IS_INT8:
            # 128 + the low 7 bits, minus 128, or 256 for a negative code.
            if INTERPRETED:
                spread = (words >> 8 if HIGH else words & 0xFF) | 0x4300
            elif HIGH:
                spread = _permute(words, "prmt.b32 $0, $1, 0x43434343, 0x4341;")
            else:
                spread = _permute(words, "prmt.b32 $0, $1, 0x43434343, 0x4240;")
            magnitude = (spread & 0xFF7F).to(tl.bfloat16, bitcast=True)
            return magnitude - (spread & 0xFF80).to(tl.bfloat16, bitcast=True)
        # An exponent of 4 bits and bias 7 becomes one of 8 bits and bias 127.
        if INTERPRETED:
            code = words >> 8 if HIGH else words & 0xFF
            spread = ((code & 0x80) << 8) | ((code & 0x7F) << 4)
        elif HIGH:
            spread = _permute(
                words,
                """{.reg .b32 sign, rest;
                and.b32 sign, $1, 0x80008000;
                shr.b32 rest, $1, 4;
                and.b32 rest, rest, 0x07F007F0;
                or.b32 $0, rest, sign;}""",
            )
        else:
            spread = _permute(
                words,
                """{.reg .b32 sign, rest;
                shl.b32 rest, $1, 8;
                and.b32 sign, rest, 0x80008000;
                shl.b32 rest, $1, 4;
                and.b32 rest, rest, 0x07F007F0;
                or.b32 $0, rest, sign;}""",
            )
        return spread.to(tl.bfloat16, bitcast=True) * 2.0**120
    code = words >> 8 if HIGH else words & 0xFF
    if IS_INT8:
        return ((code ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0).to(dtype)  # 1024 + 128 + the code
    # An exponent of 4 bits and bias 7 becomes one of 5 bits and bias 15.
    spread = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return (spread.to(tl.float16, bitcast=True) * 256.0).to(dtype)


@triton.jit
@no_type_check
def _attend_quantized_tiles(
    even,
    odd,
    maximum,
    total,
    query,
    keys,
    values,
    block_table,
    first_tile,
    last_tile,
    visible,
    context_len,
    key_block_stride,
    value_block_stride,
    score_scale,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Do what `_attend_tiles` does for quantised pages. even, odd: accumulators of those dimensions of the output."""
    IS_INT8: tl.constexpr = keys.dtype.element_ty == tl.int8
    dtype: tl.constexpr = query.dtype
    word: tl.constexpr = tl.pointer_type(tl.uint16)
    pair = tl.arange(0, BLOCK_N // 2)
    dim = tl.arange(0, D_PADDED)
    dim_pair = tl.arange(0, D_PADDED // 2)
    key_words, value_words = keys.to(word), values.to(word)
    key_scales = (keys + D * BLOCK_SIZE).to(tl.pointer_type(tl.float32))
    value_scales = (values + D * BLOCK_SIZE).to(tl.pointer_type(tl.float32))
    for tile in range(first_tile, last_tile):
        position = tile * BLOCK_N + 2 * pair
        first_entry = block_table + tile * BLOCK_N // BLOCK_SIZE
        block = tl.zeros([BLOCK_N // 2], tl.int32) + tl.load(first_entry)
        for entry in tl.static_range(1, (BLOCK_N + BLOCK_SIZE - 1) // BLOCK_SIZE):
            if MASKED:
                start = tile * BLOCK_N + entry * BLOCK_SIZE
                next_block = tl.load(first_entry + entry, mask=start < context_len, other=0)
            else:
                next_block = tl.load(first_entry + entry)
            block = tl.where(pair // (BLOCK_SIZE // 2) == entry, next_block, block)
        block = block.to(tl.int64)
        pair_offset = (tile * (BLOCK_N // 2) + pair) % (BLOCK_SIZE // 2)

        # As in `_attend_tiles`, keys past the context are loaded and values are not.
        key_pointers = key_words + (block * (key_block_stride // 2) + pair_offset)[None, :]
        key_pointers += dim[:, None] * (BLOCK_SIZE // 2)
        key = tl.load(key_pointers) if D == D_PADDED else tl.load(key_pointers, mask=(dim < D)[:, None], other=0)
        key_scale = key_scales + (block * (key_block_stride // 4) + 2 * pair_offset)
        even_scores = tl.dot(query, _codes(key, False, IS_INT8, dtype), input_precision="ieee")
        odd_scores = tl.dot(query, _codes(key, True, IS_INT8, dtype), input_precision="ieee")
        even_scores *= tl.load(key_scale)[None, :]
        odd_scores *= tl.load(key_scale + 1)[None, :]
        if MASKED:
            even_scores = tl.where(position[None, :] < visible[:, None], even_scores, float("-inf"))
            odd_scores = tl.where(position[None, :] + 1 < visible[:, None], odd_scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(tl.maximum(even_scores, odd_scores), 1) * score_scale)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) if MASKED else new_maximum
        even_weights = tl.math.exp2(even_scores * score_scale - shift[:, None])
        odd_weights = tl.math.exp2(odd_scores * score_scale - shift[:, None])
        rescale = tl.math.exp2(maximum - shift)
        total = total * rescale + tl.sum(even_weights + odd_weights, 1)
        even *= rescale[:, None]
        odd *= rescale[:, None]
        maximum = new_maximum

        value_rows = value_words + (block * (value_block_stride // 2) + pair_offset * D)[:, None] + dim_pair[None, :]
        scale_pointers = value_scales + (block * (value_block_stride // 4) + 2 * pair_offset)
        if MASKED:
            in_head = (dim_pair < D // 2)[None, :]
            even_value = tl.load(value_rows, mask=(position < context_len)[:, None] & in_head, other=0)
            odd_value = tl.load(value_rows + D // 2, mask=(position + 1 < context_len)[:, None] & in_head, other=0)
            even_weights *= tl.load(scale_pointers, mask=position < context_len, other=0.0)[None, :]
            odd_weights *= tl.load(scale_pointers + 1, mask=position + 1 < context_len, other=0.0)[None, :]
        else:
            if D == D_PADDED:
                even_value, odd_value = tl.load(value_rows), tl.load(value_rows + D // 2)
            else:
                even_value = tl.load(value_rows, mask=(dim_pair < D // 2)[None, :], other=0)
                odd_value = tl.load(value_rows + D // 2, mask=(dim_pair < D // 2)[None, :], other=0)
            even_weights *= tl.load(scale_pointers)[None, :]
            odd_weights *= tl.load(scale_pointers + 1)[None, :]
        even_weights, odd_weights = even_weights.to(dtype), odd_weights.to(dtype)
        even = tl.dot(even_weights, _codes(even_value, False, IS_INT8, dtype), even, input_precision="ieee")
        even = tl.dot(odd_weights, _codes(odd_value, False, IS_INT8, dtype), even, input_precision="ieee")
        odd = tl.dot(even_weights, _codes(even_value, True, IS_INT8, dtype), odd, input_precision="ieee")
        odd = tl.dot(odd_weights, _codes(odd_value, True, IS_INT8, dtype), odd, input_precision="ieee")
    return even, odd, maximum, total


@triton.jit
@no_type_check
def attend(
    query,
    keys,
    values,
    block_table,
    first_tile,
    unmasked_end,
    masked_start,
    last_tile,
    visible,
    context_len,
    key_block_stride,
    value_block_stride,
    score_scale,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALL_MASKED: tl.constexpr = False,
):
    """Attend from BLOCK_M query rows to tiles `first_tile : unmasked_end` and `masked_start : last_tile`.

    query: [BLOCK_M, D_PADDED]. keys and values point at block 0 of one head, block_table at the sequence's first entry.
    Every row must see every position of the unmasked tiles, of which there are none with ALL_MASKED; in the others row
    r sees positions below visible[r].
    Returns the output [BLOCK_M, D_PADDED], zero for rows that see no position, and the maximum and the sum of the
    weights [BLOCK_M] in powers of two (`score_scale` is the softmax scale times log2 e), all float32.
    """
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if keys.dtype.element_ty.primitive_bitwidth == 8:
        even = tl.zeros([BLOCK_M, D_PADDED // 2], tl.float32)
        odd = tl.zeros([BLOCK_M, D_PADDED // 2], tl.float32)
        if not ALL_MASKED:
            even, odd, maximum, total = _attend_quantized_tiles(
                even, odd, maximum, total, query, keys, values, block_table, first_tile, unmasked_end,
                visible, context_len, key_block_stride, value_block_stride, score_scale,
                D, D_PADDED, BLOCK_SIZE, BLOCK_N, False,
            )  # fmt: skip
        even, odd, maximum, total = _attend_quantized_tiles(
            even, odd, maximum, total, query, keys, values, block_table, masked_start, last_tile,
            visible, context_len, key_block_stride, value_block_stride, score_scale,
            D, D_PADDED, BLOCK_SIZE, BLOCK_N, True,
        )  # fmt: skip
        accumulator = tl.reshape(tl.join(even, odd), [BLOCK_M, D_PADDED])
    else:
        accumulator = tl.zeros([BLOCK_M, D_PADDED], tl.float32)
        if not ALL_MASKED:
            accumulator, maximum, total = _attend_tiles(
                accumulator, maximum, total, query, keys, values, block_table, first_tile, unmasked_end,
                visible, context_len, key_block_stride, value_block_stride, score_scale,
                D, D_PADDED, BLOCK_SIZE, BLOCK_N, False,
            )  # fmt: skip
        accumulator, maximum, total = _attend_tiles(
            accumulator, maximum, total, query, keys, values, block_table, masked_start, last_tile,
            visible, context_len, key_block_stride, value_block_stride, score_scale,
            D, D_PADDED, BLOCK_SIZE, BLOCK_N, True,
        )  # fmt: skip
    return accumulator / tl.where(total == 0.0, 1.0, total)[:, None], maximum, total


def strides(query: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor) -> tuple[int, ...]:
    """Return the strides that both kernels take, in elements: token and head, block and head (twice), sequence."""
    return (*query.stride()[:2], *keys.stride()[:2], *values.stride()[:2], block_tables.stride(0))


def shape_constants(query: Tensor, keys: Tensor) -> dict[str, int]:
    """Return the constants that both kernels take. query: [T, H, D]; keys: [NB, KV, D, BS]."""
    _, heads, head_dim = query.shape
    return {
        "H": heads,
        "GROUP": heads // keys.shape[1],
        "D": head_dim,
        "D_PADDED": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": keys.shape[3],
    }
