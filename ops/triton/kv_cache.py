"""Write keys and values to their slots in the paged KV cache: `ops.write_kv` on CUDA."""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.triton.tuning import MIN_TILED_WRITE_TOKENS, TILED_WRITE_TOKENS


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

    keys: [NB, KV, D, BS] and values: [NB, KV, BS, D], contiguous in their last two dimensions; key and value:
    [T, KV, D], contiguous in D; slot_mapping: [T], int32 or int64. KVSlots are not checked.
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
