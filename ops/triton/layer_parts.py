"""What stands around a layer's products where those are torch's, or where a head must be known whole."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.norm import Norm
from ops.triton.products import await_previous, clear, start_next
from ops.triton.rotate_product import Slots


@triton.jit
@no_type_check
def norm_kernel(
    output, total, x, residual, weight, x_stride, eps, E: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    """One program: a row of x, to which a row of `residual` is added before, as `total`. Grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < E
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual + row * E + column, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + row * E + column, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    normed = (wide * tl.math.rsqrt(tl.sum(wide * wide, 0) / E + eps)).to(output.dtype.element_ty).to(tl.float32)
    normed *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * E + column, normed.to(output.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def gate_halves_kernel(output, gate_up, F, BLOCK: tl.constexpr):
    """One program: BLOCK features of a row. Grid (T, ceil(F / BLOCK))."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < F
    gate = tl.load(gate_up + row * 2 * F + feature, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + feature, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(output + row * F + feature, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def rotate_heads_kernel(
    query,
    keys,
    values,
    slot_mapping,
    arrivals,
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
    ARRIVALS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: one head of one token, as its two halves. Grid (T, H + 2 KV)."""
    start_next(EARLY)
    D2: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, D2_PADDED)
    inside = dim < D2
    await_previous(EARLY)
    clear(arrivals, (tl.program_id(0) == 0) & (head == 0), ARRIVALS)
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


def norm_rows(x: Tensor, norm: Norm, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(the norm of x + residual, x + residual), each [T, E], as `ops.rms_norm` rounds."""
    rows, hidden = x.shape
    output = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    added = x if residual is None else residual.contiguous()
    block = triton.next_power_of_2(hidden)
    norm_kernel[(rows,)](
        output,
        total,
        x,
        added,
        norm.weight,
        x.stride(0),
        norm.eps,
        E=hidden,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        num_warps=4 if block <= 2048 else 8,
    )
    return output, total


def gate_halves(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves of each row. gate_up: [T, 2 F], contiguous. Returns [T, F]."""
    rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty((rows, intermediate), dtype=gate_up.dtype, device=gate_up.device)
    block = min(triton.next_power_of_2(intermediate), 1024)
    gate_halves_kernel[(rows, triton.cdiv(intermediate, block))](
        output, gate_up, intermediate, BLOCK=block, num_warps=4
    )
    return output


def rotate_heads(
    projected: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    slots: Slots,
    heads: int,
    early: bool = False,
) -> Tensor:
    """`ops.rotate_and_write` in one kernel: queries [T, H, D] of projected [T, (H + 2 KV) * D], contiguous."""
    _, kv_heads, head_dim, block_size = slots.keys.shape
    rows = projected.shape[0]
    query = torch.empty((rows, heads, head_dim), dtype=projected.dtype, device=projected.device)
    has_norm = query_norm is not None and key_norm is not None
    rotate_heads_kernel[(rows, heads + 2 * kv_heads)](
        query,
        slots.keys,
        slots.values,
        slots.slot_mapping,
        slots.slot_mapping if slots.arrivals is None else slots.arrivals,
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
        ARRIVALS=0 if slots.arrivals is None else len(slots.arrivals),
        HAS_NORM=has_norm,
        EARLY=early,
        num_warps=1,
        **({"launch_pdl": True} if early else {}),
    )
    return query
