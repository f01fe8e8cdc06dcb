"""Queries ready to attend, and keys and values in their pages, from hidden states: `ops.qkv_rope_write` on CUDA."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.norm import Norm
from dispec.ops.triton.linear import fused_linear
from dispec.ops.triton.rotate_product import Slots, rotate_product
from dispec.ops.triton.tuning import WRITE_LONG_FROM, WRITE_TOKENS_LONG, choose_product, describe


@triton.jit(do_not_specialize=["rows"])
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
    rows,
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
):
    """One program: one head of TOKENS tokens, as its two halves. Grid (ceil(T / TOKENS), H + 2 KV).

    Keys are turned in shared memory before they are stored: positions are innermost in their pages, and neighbouring
    tokens share memory sectors there.
    """
    D2: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    dim = tl.arange(0, D2_PADDED)
    is_row = row < rows
    inside = is_row[:, None] & (dim < D2)[None, :]
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
        slot = tl.load(slot_mapping + row, mask=is_row, other=0)
        block, offset = (slot // BLOCK_SIZE).to(tl.int64), (slot % BLOCK_SIZE).to(tl.int64)
        if head < H + KV:
            key = keys + block * keys_block_stride + (head - H) * keys_head_stride + offset
            turned = key[None, :] + (dim * BLOCK_SIZE)[:, None]
            is_key = is_row[None, :] & (dim < D2)[:, None]
            tl.store(turned, tl.trans(first), mask=is_key)
            tl.store(turned + D2 * BLOCK_SIZE, tl.trans(second), mask=is_key)
        else:
            value = values + block * values_block_stride + (head - H - KV) * values_head_stride + offset * D
            to = value[:, None] + dim[None, :]
            tl.store(to, first, mask=inside)
            tl.store(to + D2, second, mask=inside)


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
    """`ops.rope_write` in one kernel; projected: [T, (H + 2 KV) * D], contiguous. Returns [T, H, D]."""
    _, kv_heads, head_dim, block_size = slots.keys.shape
    rows = projected.shape[0]
    heads = projected.shape[1] // head_dim - 2 * kv_heads
    query = torch.empty((rows, heads, head_dim), dtype=projected.dtype, device=projected.device)
    if rows == 0:
        return query
    has_norm = query_norm is not None and key_norm is not None
    tokens = WRITE_TOKENS_LONG if rows >= WRITE_LONG_FROM else 1
    rotate_heads_kernel[(triton.cdiv(rows, tokens), heads + 2 * kv_heads)](
        query,
        slots.keys,
        slots.values,
        slots.slot_mapping,
        slots.cosine,
        slots.sine,
        projected,
        query_norm if has_norm else projected,
        key_norm if has_norm else projected,
        rows,
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
    )
    return query
