"""Queries ready to attend, and keys and values in their pages, from hidden states: `ops.qkv_rope_write` on CUDA."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.norm import Norm
from ops.triton.linear import fused_linear
from ops.triton.rotate_product import Slots, rotate_product
from ops.triton.tuning import choose_product, describe


@triton.jit
@no_type_check
def rotate_heads_kernel(
    query,
    keys,
    values,
    slot_mapping,
    cosine,
    sine,
    projected,
    query_norm,
    key_norm,
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
):
    """One program: one head of one token, as its two halves. Grid (T, H + 2 KV)."""
    D2: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, D2_PADDED)
    inside = dim < D2
    at = projected + (row * (H + 2 * KV) + head) * D + dim
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + D2, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = query.dtype.element_ty
    if head < H + KV:
        if HAS_NORM:
            norm = query_norm if head < H else key_norm
            inverse = tl.math.rsqrt(tl.sum(first * first + second * second, 0) / D + eps)
            first = (first * inverse).to(dtype).to(tl.float32)
            second = (second * inverse).to(dtype).to(tl.float32)
            first *= tl.load(norm + dim, mask=inside, other=0.0).to(tl.float32)
            second *= tl.load(norm + D2 + dim, mask=inside, other=0.0).to(tl.float32)
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        cos = tl.load(cosine + row * D2 + dim, mask=inside, other=1.0)
        sin = tl.load(sine + row * D2 + dim, mask=inside, other=0.0)
        first, second = first * cos - second * sin, second * cos + first * sin
    if head < H:
        to = query + (row * H + head) * D + dim
        tl.store(to, first.to(dtype), mask=inside)
        tl.store(to + D2, second.to(dtype), mask=inside)
    else:
        slot = tl.load(slot_mapping + row)
        block, offset = (slot // BLOCK_SIZE).to(tl.int64), (slot % BLOCK_SIZE).to(tl.int64)
        if head < H + KV:
            to = keys + block * keys_block_stride + (head - H) * keys_head_stride + offset + dim * BLOCK_SIZE
            tl.store(to, first.to(dtype), mask=inside)
            tl.store(to + D2 * BLOCK_SIZE, second.to(dtype), mask=inside)
        else:
            to = values + block * values_block_stride + (head - H - KV) * values_head_stride + offset * D + dim
            tl.store(to, first.to(dtype), mask=inside)
            tl.store(to + D2, second.to(dtype), mask=inside)


def qkv_rope_write(
    x: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    norm: Norm,
    slots: Slots,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
) -> Tensor:
    """`ops.qkv_rope_write` in 16 bits: one kernel for few rows, else a product and `rotate_heads`.

    x: [T, E]; qkv: [(H + 2 KV) * D, E]; bias: [(H + 2 KV) * D]. Head norms have the `eps` of `norm`, and need whole
    heads, which no program of the one kernel has. Returns [T, H, D].
    """
    config = choose_product(describe(x.device), x.shape[0], *qkv.shape, has_norm=True)
    if config is None or query_norm is not None or not qkv.is_contiguous():
        projected = fused_linear(x, qkv, bias, norm, is_gated=False)
        return rotate_heads(projected, query_norm, key_norm, norm.eps, slots)
    return rotate_product(x.contiguous(), qkv, bias, norm, slots, config)


def rotate_heads(
    projected: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    slots: Slots,
) -> Tensor:
    """`ops.rotate_and_write` in one kernel; projected: [T, (H + 2 KV) * D], contiguous. Returns [T, H, D]."""
    _, kv_heads, head_dim, block_size = slots.keys.shape
    rows = projected.shape[0]
    heads = projected.shape[1] // head_dim - 2 * kv_heads
    query = torch.empty((rows, heads, head_dim), dtype=projected.dtype, device=projected.device)
    if rows == 0:
        return query
    has_norm = query_norm is not None and key_norm is not None
    rotate_heads_kernel[(rows, heads + 2 * kv_heads)](
        query,
        slots.keys,
        slots.values,
        slots.slot_mapping,
        slots.cosine,
        slots.sine,
        projected,
        query_norm if has_norm else projected,
        key_norm if has_norm else projected,
        eps,
        *slots.strides,
        H=heads,
        KV=kv_heads,
        D=head_dim,
        D2_PADDED=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=block_size,
        HAS_NORM=has_norm,
        num_warps=1,
    )
    return query
