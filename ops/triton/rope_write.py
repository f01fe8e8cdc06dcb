"""Head norms, rotation and the KV cache write of projected queries, keys and values, in one kernel."""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.kv_cache import scale_rows
from dispec.ops.triton.kv_cache import largest_magnitude, quantize, store_scales
from dispec.ops.triton.overlap import launch_next, overlap_options, wait
from dispec.ops.triton.tuning import MIN_TILED_WRITE_TOKENS, TILED_WRITE_TOKENS


class KVSlots(NamedTuple):
    """The pages of a layer, the slots of a step's tokens in them, and the rotation of their positions.

    keys: [NB, KV, DP, BS] and values: [NB, KV, BS, DP], contiguous in their last two dimensions; slot_mapping: [T]
    int32; cosine and sine: [T, D / 2] float32, contiguous.
    """

    keys: Tensor
    values: Tensor
    slot_mapping: Tensor
    cosine: Tensor
    sine: Tensor

    @property
    def head_dim(self) -> int:
        return self.keys.shape[2] - scale_rows(self.keys.dtype)

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the blocks and heads of keys and values, in elements."""
        return (*self.keys.stride()[:2], *self.values.stride()[:2])


@triton.jit(do_not_specialize=["num_tokens"])
@no_type_check
def rope_write_kernel(
    query,
    keys,
    values,
    slot_mapping,
    cosine,
    sine,
    projected,
    query_norm,
    key_norm,
    num_tokens,
    eps,
    keys_block_stride,
    keys_head_stride,
    values_block_stride,
    values_head_stride,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    D2_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Norm, rotate and write one head of TOKENS tokens, as its two halves. Grid (ceil(T / TOKENS), H + 2 KV).

    Keys are transposed in shared memory before they are stored: positions are innermost in their pages, and
    neighbouring tokens share memory sectors there.
    """
    launch_next(OVERLAPS)
    wait(OVERLAPS)
    D2: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    dim = tl.arange(0, D2_PADDED)
    is_token = row < num_tokens
    inside = is_token[:, None] & (dim < D2)[None, :]
    at = projected + ((row * (H + 2 * KV) + head) * D)[:, None] + dim[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + D2, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = query.dtype.element_ty
    if head < H + KV:
        if HAS_NORM:
            norm = query_norm if head < H else key_norm
            inverse = tl.math.rsqrt(tl.sum(first * first + second * second, 1) / D + eps)[:, None]
            first = (first * inverse).to(dtype).to(tl.float32)
            second = (second * inverse).to(dtype).to(tl.float32)
            first *= tl.load(norm + dim, mask=dim < D2, other=0.0).to(tl.float32)[None, :]
            second *= tl.load(norm + D2 + dim, mask=dim < D2, other=0.0).to(tl.float32)[None, :]
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        angle = (row * D2)[:, None] + dim[None, :]
        cos = tl.load(cosine + angle, mask=inside, other=1.0)
        sin = tl.load(sine + angle, mask=inside, other=0.0)
        first, second = first * cos - second * sin, second * cos + first * sin
    first, second = first.to(dtype), second.to(dtype)
    if head < H:
        to = query + ((row * H + head) * D)[:, None] + dim[None, :]
        tl.store(to, first, mask=inside)
        tl.store(to + D2, second, mask=inside)
    else:
        slot = tl.load(slot_mapping + row, mask=is_token, other=0)
        block, offset = (slot // BLOCK_SIZE).to(tl.int64), (slot % BLOCK_SIZE).to(tl.int64)
        if keys.dtype.element_ty.primitive_bitwidth == 8:
            largest = tl.maximum(largest_magnitude(first), largest_magnitude(second), tl.PropagateNan.ALL)
            stored_first = quantize(first, largest, keys.dtype.element_ty)
            stored_second = quantize(second, largest, keys.dtype.element_ty)
            if head < H + KV:
                page = block * keys_block_stride + (head - H) * keys_head_stride
                store_scales(keys, page, offset, largest, is_token, D, BLOCK_SIZE)
            else:
                page = block * values_block_stride + (head - H - KV) * values_head_stride
                store_scales(values, page, offset, largest, is_token, D, BLOCK_SIZE)
        else:
            stored_first, stored_second = first, second
        if head < H + KV:
            key = keys + block * keys_block_stride + (head - H) * keys_head_stride + offset
            key_rows = key[None, :] + (dim * BLOCK_SIZE)[:, None]
            is_key = is_token[None, :] & (dim < D2)[:, None]
            tl.store(key_rows, tl.trans(stored_first), mask=is_key)
            tl.store(key_rows + D2 * BLOCK_SIZE, tl.trans(stored_second), mask=is_key)
        else:
            value = values + block * values_block_stride + (head - H - KV) * values_head_stride + offset * D
            to = value[:, None] + dim[None, :]
            tl.store(to, stored_first, mask=inside)
            tl.store(to + D2, stored_second, mask=inside)


def rope_write(
    projected: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    slots: KVSlots,
) -> Tensor:
    """Compute `ops.rope_write` in one kernel. projected: [T, (H + 2 KV) * D], contiguous. Returns [T, H, D]."""
    kv_heads, head_dim, block_size = slots.keys.shape[1], slots.head_dim, slots.keys.shape[3]
    num_tokens = projected.shape[0]
    heads = projected.shape[1] // head_dim - 2 * kv_heads
    query = torch.empty((num_tokens, heads, head_dim), dtype=projected.dtype, device=projected.device)
    if num_tokens == 0:
        return query
    has_norm = query_norm is not None and key_norm is not None
    tokens = TILED_WRITE_TOKENS if num_tokens >= MIN_TILED_WRITE_TOKENS else 1
    rope_write_kernel[(triton.cdiv(num_tokens, tokens), heads + 2 * kv_heads)](
        query,
        slots.keys,
        slots.values,
        slots.slot_mapping,
        slots.cosine,
        slots.sine,
        projected,
        query_norm if has_norm else projected,
        key_norm if has_norm else projected,
        num_tokens,
        eps,
        *slots.strides,
        H=heads,
        KV=kv_heads,
        D=head_dim,
        D2_PADDED=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=block_size,
        HAS_NORM=has_norm,
        TOKENS=tokens,
        num_warps=4 if tokens > 1 else 1,
        **overlap_options(projected),
    )
    return query
