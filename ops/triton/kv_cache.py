"""Write keys and values to their slots in the paged KV cache: `ops.write_kv` on CUDA.

The dtype of the pages tells how they are written: pages of one byte an element are quantised as `ops.kv_cache` says.
"""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.triton.tuning import MIN_TILED_WRITE_TOKENS, TILED_WRITE_TOKENS


@triton.jit
@no_type_check
def largest_magnitude(x):
    """Return the largest magnitude of each row of x [T, D], in float32; NaN if there is one."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF  # tl.max ignores NaN; as integers they are largest
    return tl.max(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def largest_code(dtype: tl.constexpr):
    return 127.0 if dtype == tl.int8 else 448.0


@triton.jit
@no_type_check
def quantize(x, largest, dtype: tl.constexpr):
    """Return the codes of rows x [T, D] with the largest magnitudes [T]: bit by bit `ops.kv_cache.quantize_heads`."""
    finite = tl.maximum(largest, 2.0**-100, tl.PropagateNan.ALL)
    inverse = tl.div_rn(tl.full(largest.shape, 1.0, tl.float32), finite) * largest_code(dtype)  # as torch divides
    codes = x.to(tl.float32) * inverse[:, None]
    if dtype == tl.int8:
        # Half to even by comparisons: a sum or a difference would be fused with the product above, which then is not
        # rounded.
        below = tl.floor(codes)
        middle = below + 0.5
        is_odd = 2 * tl.floor(below * 0.5) != below
        codes = tl.where((codes > middle) | ((codes == middle) & is_odd), below + 1, below)
    return codes.to(dtype)


@triton.jit
@no_type_check
def store_scales(pages, page, offset, largest, mask, D: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Store the scales of tokens at `offset` of the pages that begin at element `page` of `pages`."""
    dtype: tl.constexpr = pages.dtype.element_ty
    divisor = tl.full(largest.shape, largest_code(dtype), tl.float32)
    scales = pages.to(tl.pointer_type(tl.float32)) + ((page + D * BLOCK_SIZE) // 4 + offset)
    tl.store(scales, tl.div_rn(largest, divisor), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
@no_type_check
def write_kv_kernel(
    keys,
    values,
    key,
    value,
    slot_mapping,
    num_tokens,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    keys_block_stride,
    keys_head_stride,
    values_block_stride,
    values_head_stride,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write one head of TOKENS tokens. Grid (ceil(T / TOKENS), KV).

    The key tile is transposed in shared memory before it is stored, so that neighbouring threads hold neighbouring
    tokens: their slots are mostly neighbours too, and positions are innermost in a key page.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, D_PADDED)
    in_step = token < num_tokens
    slot = tl.load(slot_mapping + token, mask=in_step, other=0)
    block = (slot // BLOCK_SIZE).to(tl.int64)
    offset = (slot % BLOCK_SIZE).to(tl.int64)
    row = token.to(tl.int64)
    mask = in_step[:, None] & (dim < D)[None, :]

    key_rows = row * key_token_stride + head * key_head_stride
    key_tile = tl.load(key + key_rows[:, None] + dim[None, :], mask=mask, other=0.0)
    value_rows = row * value_token_stride + head * value_head_stride
    value_tile = tl.load(value + value_rows[:, None] + dim[None, :], mask=mask, other=0.0)

    if keys.dtype.element_ty.primitive_bitwidth == 8:
        largest_key, largest_value = largest_magnitude(key_tile), largest_magnitude(value_tile)
        key_tile = quantize(key_tile, largest_key, keys.dtype.element_ty)
        value_tile = quantize(value_tile, largest_value, values.dtype.element_ty)
        key_page = block * keys_block_stride + head * keys_head_stride
        store_scales(keys, key_page, offset, largest_key, in_step, D, BLOCK_SIZE)
        value_page = block * values_block_stride + head * values_head_stride
        store_scales(values, value_page, offset, largest_value, in_step, D, BLOCK_SIZE)
    value_slots = block * values_block_stride + head * values_head_stride + offset * D
    tl.store(values + value_slots[:, None] + dim[None, :], value_tile.to(values.dtype.element_ty), mask=mask)
    key_slots = block * keys_block_stride + head * keys_head_stride + offset
    tl.store(
        keys + key_slots[None, :] + dim[:, None] * BLOCK_SIZE,
        tl.trans(key_tile).to(keys.dtype.element_ty),
        mask=in_step[None, :] & (dim < D)[:, None],
    )


def write_kv(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
    """Store token t's key and value at slot `slot_mapping[t]` (block * BS + offset), in place.

    keys: [NB, KV, DP, BS] and values: [NB, KV, BS, DP], contiguous in their last two dimensions; key and value:
    [T, KV, D], contiguous in D; slot_mapping: [T], int32 or int64. Slots are not checked.
    """
    num_tokens, kv_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    tokens = TILED_WRITE_TOKENS if num_tokens >= MIN_TILED_WRITE_TOKENS else 1
    write_kv_kernel[(triton.cdiv(num_tokens, tokens), kv_heads)](
        keys,
        values,
        key,
        value,
        slot_mapping,
        num_tokens,
        *(stride for tensor in (key, value, keys, values) for stride in tensor.stride()[:2]),
        D=head_dim,
        D_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=keys.shape[3],
        TOKENS=tokens,
        num_warps=4 if tokens > 1 else 2,
    )
