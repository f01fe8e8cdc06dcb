"""Norm, QKV projection, rotation and the KV cache write: `ops.qkv_rope_write` on CUDA."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.kv_cache import LARGEST_CODE, pages_of_layer
from dispec.ops.norm import Norm
from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig, choose_fused_linear
from dispec.ops.triton.linear import fused_linear
from dispec.ops.triton.norm_activation import rms_norm
from dispec.ops.triton.overlap import launch_next, prefetch_and_wait
from dispec.ops.triton.rope_write import KVSlots, rope_write
from dispec.ops.triton.skinny_gemm import launch_options, skinny_gemm
from dispec.ops.triton.tuning import describe


@triton.jit(do_not_specialize=["num_tokens"])
@no_type_check
def qkv_rope_write_kernel(
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
    num_tokens,
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
    OVERLAPS: tl.constexpr,
    PREFETCHED: tl.constexpr,
):
    """Project `norm(x) @ weight.T + bias`, rotate queries [T, H, D] and keys, and write keys and values to their slots.

    Computes BLOCK_N / 2 pairs of dimensions that rotate together, of all tokens. Grid
    (ceil((H + 2 KV) * D / BLOCK_N),). The projection is rounded before the rotation, as a separate operation would, so
    that decode and prefill steps write the same keys and values.
    """
    D2: tl.constexpr = D // 2
    HEADS: tl.constexpr = H + 2 * KV
    lane = tl.arange(0, BLOCK_N)
    wide_pair = tl.program_id(0) * (BLOCK_N // 2) + lane // 2
    feature = wide_pair // D2 * D + lane % 2 * D2 + wide_pair % D2
    is_feature = wide_pair < HEADS * D2
    row = tl.arange(0, BLOCK_M)
    prefetch_and_wait(weight, feature, is_feature, 0, K, OVERLAPS, PREFETCHED)
    result = skinny_gemm(
        weight, feature, is_feature, x, x_stride, num_tokens, norm, eps,
        K, BLOCK_M, BLOCK_N, BLOCK_K, TENSOR_CORES, NORM,
    )  # fmt: skip
    launch_next(OVERLAPS)
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    result = result.to(query.dtype.element_ty).to(tl.float32)
    first, second = tl.split(tl.reshape(result, [BLOCK_M, BLOCK_N // 2, 2]))

    pair = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    head, dim = pair // D2, pair % D2
    is_token = row < num_tokens
    rotates = is_token[:, None] & (head < H + KV)[None, :]
    angle = row[:, None] * D2 + dim[None, :]
    cos = tl.load(cosine + angle, mask=rotates, other=1.0)
    sin = tl.load(sine + angle, mask=rotates, other=0.0)
    rotated = tl.where(rotates, first * cos - second * sin, first).to(query.dtype.element_ty)
    rotated_second = tl.where(rotates, second * cos + first * sin, second).to(query.dtype.element_ty)

    is_query = is_token[:, None] & (head < H)[None, :]
    queries = query + row[:, None] * (H * D) + (head * D + dim)[None, :]
    tl.store(queries, rotated, mask=is_query)
    tl.store(queries + D2, rotated_second, mask=is_query)
    slot = tl.load(slot_mapping + row, mask=is_token, other=0)
    block, offset = (slot // BLOCK_SIZE).to(tl.int64)[:, None], (slot % BLOCK_SIZE).to(tl.int64)[:, None]
    is_key = is_token[:, None] & ((head >= H) & (head < H + KV))[None, :]
    at = block * keys_block_stride + offset + ((head - H) * keys_head_stride + dim * BLOCK_SIZE)[None, :]
    tl.store(keys + at, rotated, mask=is_key)
    tl.store(keys + at + D2 * BLOCK_SIZE, rotated_second, mask=is_key)
    is_value = is_token[:, None] & ((head >= H + KV) & (head < HEADS))[None, :]
    at = block * values_block_stride + offset * D + ((head - H - KV) * values_head_stride + dim)[None, :]
    tl.store(values + at, rotated, mask=is_value)
    tl.store(values + at + D2, rotated_second, mask=is_value)


def fused_qkv_rope_write(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    slots: KVSlots,
    config: SkinnyGemmConfig,
) -> Tensor:
    """Return rotated queries [T, H, D] of `norm(x) @ weight.T + bias`, in one kernel; write keys and values.

    x: [T, K], contiguous in its rows; weight: [(H + 2 KV) * D, K], contiguous; bias: [(H + 2 KV) * D].
    """
    num_tokens, in_features = x.shape
    kv_heads, head_dim, block_size = slots.keys.shape[1], slots.head_dim, slots.keys.shape[3]
    heads = weight.shape[0] // head_dim - 2 * kv_heads
    query = torch.empty((num_tokens, heads, head_dim), dtype=x.dtype, device=x.device)
    qkv_rope_write_kernel[(triton.cdiv(weight.shape[0], config.block_n),)](
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
        num_tokens,
        x.stride(0),
        0.0 if norm is None else norm.eps,
        *slots.strides,
        K=in_features,
        H=heads,
        KV=kv_heads,
        D=head_dim,
        BLOCK_SIZE=block_size,
        HAS_BIAS=bias is not None,
        **launch_options(x, config, norm is not None),
    )
    return query


def qkv_rope_write(
    x: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    eps: float,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    layer: int | None = None,
) -> Tensor:
    """Compute `ops.qkv_rope_write` in 16 bits: in one kernel for few tokens, else a GEMM and `rope_write`.

    x: [T, E]; qkv: [(H + 2 KV) * D, E]; bias: [(H + 2 KV) * D]. All norms have the same `eps`. Head norms and the
    scales of a quantised cache need whole heads, which no program of the one kernel has. Returns [T, H, D].
    """
    slots = KVSlots(*pages_of_layer(keys, values, layer), slot_mapping, cosine.contiguous(), sine.contiguous())
    config = choose_fused_linear(describe(x.device), x.shape[0], *qkv.shape, has_norm=True)
    needs_heads = query_norm is not None or keys.dtype in LARGEST_CODE
    if config is None or config.splits > 1 or needs_heads or not qkv.is_contiguous():
        projected = fused_linear(x, qkv, bias, norm, eps, is_gated=False)
        return rope_write(projected, query_norm, key_norm, eps, slots)
    x = x.contiguous()
    if config.fuses_norm:
        return fused_qkv_rope_write(x, qkv, bias, Norm(norm, eps), slots, config)
    return fused_qkv_rope_write(rms_norm(x, Norm(norm, eps)), qkv, bias, None, slots, config)
