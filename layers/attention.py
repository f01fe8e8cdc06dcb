"""One attention layer: project, rotate, write the KV cache, attend."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

import ops
from layers.config import ModelConfig
from layers.primitives import rms_norm, rope
from layers.types import AttentionWeights, Batch, LayerKV

Rotation = tuple[Float[Tensor, "T D2"], Float[Tensor, "T D2"]]


def attention(
    x: Float[Tensor, "T E"],
    w: AttentionWeights,
    config: ModelConfig,
    batch: Batch,
    rotation: Rotation,
    kv: LayerKV,
) -> Float[Tensor, "T E"]:
    """Grouped-query attention (arXiv:2305.13245) of the step's tokens over their sequences' pages.

    Writes the tokens' keys and values to `kv` first, so that they attend to one another through the cache.
    """
    query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projected = ops.linear(x, w.qkv, w.qkv_bias)
    query, key, value = projected.split((query_rows, kv_rows, kv_rows), dim=-1)
    query = rearrange(query, "t (h d) -> t h d", d=config.head_dim)
    key = rearrange(key, "t (kv d) -> t kv d", d=config.head_dim)
    value = rearrange(value, "t (kv d) -> t kv d", d=config.head_dim)
    if w.query_norm is not None and w.key_norm is not None:
        query = rms_norm(query, w.query_norm, config.rms_norm_eps)
        key = rms_norm(key, w.key_norm, config.rms_norm_eps)
    query, key = rope(query, *rotation), rope(key, *rotation)
    ops.write_kv(kv.keys, kv.values, key, value, batch.slot_mapping)
    attended = ops.paged_attention(
        query,
        kv.keys,
        kv.values,
        batch.block_tables,
        batch.query_start,
        batch.context_lens,
        batch.query_len,
        config.attention_scale,
    )
    return ops.linear(rearrange(attended, "t h d -> t (h d)"), w.output, w.output_bias)
