"""From hidden states to rotated queries and the KV cache: QKV projection, head norms, rotation and the cache write.

All of it is one op in 16 bits on CUDA. Of a quantised weight, or on a CPU, the projection is an op of its own.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dispec.ops.cpu import attention as cpu_attention
from dispec.ops.kv_cache import pages_of_layer, scale_rows, write_kv
from dispec.ops.linear import Matrix, is_fused, linear
from dispec.ops.norm import Norm, rms_norm
from dispec.ops.registration import register

Rotation = tuple[Float[Tensor, "T D2"], Float[Tensor, "T D2"]]


def rope_cos_sin(positions: Int[Tensor, "T"], frequencies: Float[Tensor, "D2"], factor: float = 1.0) -> Rotation:
    """Return cosine and sine of the positions' angles, times `factor`, in float32. frequencies: radians per position.

    An op, because the compiler would compute the angles again in each layer that reads them.
    """
    return torch.ops.dispec.rope_cos_sin(positions, frequencies, factor)


def qkv_rope_write(
    x: Float[Tensor, "T E"],
    qkv: Matrix,
    bias: Float[Tensor, "QKV"] | None,
    norm: Norm,
    rotation: Rotation,
    keys: Shaped[Tensor, "*L NB KV DP BS"],
    values: Shaped[Tensor, "*L NB KV BS DP"],
    slot_mapping: Int[Tensor, "T"],
    query_norm: Norm | None = None,
    key_norm: Norm | None = None,
    layer: int | None = None,
) -> Float[Tensor, "T H D"]:
    """Return the rotated queries of `linear(x, qkv, bias, norm=norm)`; write keys and values as `rope_write` does.

    All norms have the same `eps`. layer: as in `write_kv`.
    """
    if isinstance(qkv, Tensor) and is_fused(x):
        query_weight, key_weight = (None if one is None else one.weight for one in (query_norm, key_norm))
        return torch.ops.dispec.qkv_rope_write(
            x, qkv, bias, *norm, *rotation, keys, values, slot_mapping, query_weight, key_weight, layer
        )
    projected = linear(x, qkv, bias, norm=norm)
    return rope_write(projected, rotation, keys, values, slot_mapping, query_norm, key_norm, layer)


def rope_write(
    projected: Float[Tensor, "T QKV"],
    rotation: Rotation,
    keys: Shaped[Tensor, "*L NB KV DP BS"],
    values: Shaped[Tensor, "*L NB KV BS DP"],
    slot_mapping: Int[Tensor, "T"],
    query_norm: Norm | None = None,
    key_norm: Norm | None = None,
    layer: int | None = None,
) -> Float[Tensor, "T H D"]:
    """Return the tokens' rotated queries; write their rotated keys and their values to slots, as in `write_kv`.

    projected: each token's query, key and value heads side by side. rotation: cosine and sine of the tokens' positions.
    Queries and keys are normed per head first where there is a norm; both norms have the same `eps`.
    """
    kv_heads, head_dim, block_size = keys.shape[-3], keys.shape[-2] - scale_rows(keys.dtype), keys.shape[-1]
    on_cpu = projected.device.type == "cpu" and cpu_attention.has_cpu_kernel(keys.dtype, head_dim, block_size)
    if on_cpu or is_fused(projected):
        query_weight, eps = query_norm or (None, 0.0)
        key_weight, _ = key_norm or (None, 0.0)
        return torch.ops.dispec.rope_write(
            projected, *rotation, keys, values, slot_mapping, query_weight, key_weight, eps, layer
        )
    heads = rearrange(projected, "t (n d) -> t n d", d=head_dim)
    query, key, value = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    if query_norm is not None and key_norm is not None:
        query, key = rms_norm(query, query_norm), rms_norm(key, key_norm)
    write_kv(keys, values, rope(key, *rotation), value, slot_mapping, layer)
    return rope(query, *rotation)


def rope(x: Float[Tensor, "T N D"], cos: Float[Tensor, "T D2"], sin: Float[Tensor, "T D2"]) -> Float[Tensor, "T N D"]:
    """Rotate dimension i with dimension i + D2 (arXiv:2104.09864, the half-split order of Hugging Face)."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rearrange(cos, "t d -> t 1 d"), rearrange(sin, "t d -> t 1 d")
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _rope_cos_sin(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    angles = torch.outer(positions.float(), frequencies)
    if factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def _qkv_rope_write(*given: Any) -> Tensor:
    from dispec.ops.triton.qkv_rope_write import qkv_rope_write as kernels

    return kernels(*given)


def _rope_write(
    projected: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    layer: int | None = None,
) -> Tensor:
    from dispec.ops.triton.rope_write import KVSlots
    from dispec.ops.triton.rope_write import rope_write as kernel

    slots = KVSlots(*pages_of_layer(keys, values, layer), slot_mapping, cosine.contiguous(), sine.contiguous())
    return kernel(projected.contiguous(), query_norm, key_norm, eps, slots)


def _rope_cos_sin_fake(positions: Tensor, frequencies: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape = positions.shape[0], frequencies.shape[0]
    return frequencies.new_empty(shape), frequencies.new_empty(shape)


def _empty_queries(x: Tensor, qkv_size: int | torch.SymInt, keys: Tensor) -> Tensor:
    kv_heads, head_dim = keys.shape[-3], keys.shape[-2] - scale_rows(keys.dtype)
    return x.new_empty(x.shape[0], qkv_size // head_dim - 2 * kv_heads, head_dim)


register(
    "rope_cos_sin(Tensor positions, Tensor frequencies, float factor) -> (Tensor, Tensor)",
    _rope_cos_sin_fake,
    cpu=_rope_cos_sin,
    cuda=_rope_cos_sin,
)
register(
    "rope_write(Tensor projected, Tensor cosine, Tensor sine, Tensor(a!) keys, Tensor(b!) values,"
    " Tensor slot_mapping, Tensor? query_norm, Tensor? key_norm, float eps, int? layer=None) -> Tensor",
    lambda projected, cosine, sine, keys, *_: _empty_queries(projected, projected.shape[1], keys),
    cpu=cpu_attention.rope_write,
    cuda=_rope_write,
)
register(
    "qkv_rope_write(Tensor x, Tensor qkv, Tensor? bias, Tensor norm, float eps, Tensor cosine, Tensor sine,"
    " Tensor(a!) keys, Tensor(b!) values, Tensor slot_mapping, Tensor? query_norm, Tensor? key_norm,"
    " int? layer=None) -> Tensor",
    lambda x, qkv, bias, norm, eps, cosine, sine, keys, *_: _empty_queries(x, qkv.shape[0], keys),
    cuda=_qkv_rope_write,
)
