"""A norm, the projection of few rows to queries, keys and values, rotation and the write to pages, in one kernel."""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.norm import Norm
from dispec.ops.triton.products import launch_options, product
from dispec.ops.triton.tuning import FewRowsConfig


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def rotate_kernel(
    query,
    keys,
    values,
    slot_mapping,
    cosine,
    sine,
    x,
    weight,
    bias,
    norm,
    rows,
    x_stride,
    eps,
    keys_block_stride,
    keys_head_stride,
    values_block_stride,
    values_head_stride,
    K: tl.constexpr,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Queries [T, H, D], rotated, and keys, rotated, and values in their pages, from `norm(x) @ weight.T + bias`.

    One program: BLOCK_N / 2 pairs of dimensions that rotate together, of all rows. Grid
    (ceil((H + 2 KV) * D / BLOCK_N),). The projection is rounded before it is rotated, as if it were an operation of
    its own, so that pages hold what a prompt's step would have written.
    """
    D2: tl.constexpr = D // 2
    HEADS: tl.constexpr = H + 2 * KV
    lane = tl.arange(0, BLOCK_N)
    wide_pair = tl.program_id(0) * (BLOCK_N // 2) + lane // 2
    feature = wide_pair // D2 * D + lane % 2 * D2 + wide_pair % D2
    is_feature = wide_pair < HEADS * D2
    row = tl.arange(0, BLOCK_M)
    result = product(
        weight, feature, is_feature, x, x_stride, rows, norm, eps,
        K, BLOCK_M, BLOCK_N, BLOCK_K, TENSOR_CORES, NORM,
    )  # fmt: skip
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    result = result.to(query.dtype.element_ty).to(tl.float32)
    first, second = tl.split(tl.reshape(result, [BLOCK_M, BLOCK_N // 2, 2]))

    pair = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    head, dim = pair // D2, pair % D2
    is_row = row < rows
    rotates = is_row[:, None] & (head < H + KV)[None, :]
    angle = row[:, None] * D2 + dim[None, :]
    cos = tl.load(cosine + angle, mask=rotates, other=1.0)
    sin = tl.load(sine + angle, mask=rotates, other=0.0)
    turned = tl.where(rotates, first * cos - second * sin, first).to(query.dtype.element_ty)
    turned_second = tl.where(rotates, second * cos + first * sin, second).to(query.dtype.element_ty)

    is_query = is_row[:, None] & (head < H)[None, :]
    queries = query + row[:, None] * (H * D) + (head * D + dim)[None, :]
    tl.store(queries, turned, mask=is_query)
    tl.store(queries + D2, turned_second, mask=is_query)
    slot = tl.load(slot_mapping + row, mask=is_row, other=0)
    block, offset = (slot // BLOCK_SIZE).to(tl.int64)[:, None], (slot % BLOCK_SIZE).to(tl.int64)[:, None]
    is_key = is_row[:, None] & ((head >= H) & (head < H + KV))[None, :]
    at = block * keys_block_stride + offset + ((head - H) * keys_head_stride + dim * BLOCK_SIZE)[None, :]
    tl.store(keys + at, turned, mask=is_key)
    tl.store(keys + at + D2 * BLOCK_SIZE, turned_second, mask=is_key)
    is_value = is_row[:, None] & ((head >= H + KV) & (head < HEADS))[None, :]
    at = block * values_block_stride + offset * D + ((head - H - KV) * values_head_stride + dim)[None, :]
    tl.store(values + at, turned, mask=is_value)
    tl.store(values + at + D2, turned_second, mask=is_value)


class Slots(NamedTuple):
    """Where a step's keys and values go, and how queries and keys are rotated: arguments of `ops.rope_write`."""

    keys: Tensor
    values: Tensor
    slot_mapping: Tensor
    cosine: Tensor
    sine: Tensor

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the blocks and heads of the pages."""
        return (*self.keys.stride()[:2], *self.values.stride()[:2])


def rotate_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    slots: Slots,
    config: FewRowsConfig,
) -> Tensor:
    """Queries [T, H, D] of `norm(x) @ weight.T + bias`, rotated; keys and values go to their slots.

    x: [T, K], contiguous in its rows; weight: [(H + 2 KV) * D, K], contiguous.
    """
    rows, columns = x.shape
    _, kv_heads, head_dim, block_size = slots.keys.shape
    heads = weight.shape[0] // head_dim - 2 * kv_heads
    query = torch.empty((rows, heads, head_dim), dtype=x.dtype, device=x.device)
    rotate_kernel[(triton.cdiv(weight.shape[0], config.block_n),)](
        query,
        slots.keys,
        slots.values,
        slots.slot_mapping,
        slots.cosine,
        slots.sine,
        x,
        weight,
        weight if bias is None else bias,
        weight if norm is None else norm.weight,
        rows,
        x.stride(0),
        0.0 if norm is None else norm.eps,
        *slots.strides,
        K=columns,
        H=heads,
        KV=kv_heads,
        D=head_dim,
        BLOCK_SIZE=block_size,
        HAS_BIAS=bias is not None,
        **launch_options(x, config, norm is not None),
    )
    return query
