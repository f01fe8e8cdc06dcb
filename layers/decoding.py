"""A model gathered for `ops.decode`, which decodes without its host."""

from jaxtyping import Int
from torch import Tensor, arange

import ops
from layers.config import ModelConfig
from layers.rope import rope_rotation
from layers.types import KVCache, Weights, layers


def decoder(
    weights: Weights,
    config: ModelConfig,
    kv_cache: KVCache,
    max_positions: int,
    num_columns: int,
    head_tokens: Int[Tensor, "V"] | None,
) -> ops.Decoder | None:
    """None where there is no kernel for it. num_columns, head_tokens: as `ops.decoder` takes them."""
    if config.shard is not None:
        return None
    gathered = tuple(
        ops.DecoderLayer(
            w.attention_norm,
            w.attention.qkv,
            w.attention.qkv_bias,
            w.attention.query_norm,
            w.attention.key_norm,
            w.attention.output,
            w.attention.output_bias,
            w.mlp_norm,
            w.mlp.gate_up,
            w.mlp.down,
            *kv,
        )
        for w, kv in zip(layers(weights.blocks), kv_cache.layers(), strict=True)
    )
    factor = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    positions = arange(max_positions, device=weights.rope_frequencies.device)
    return ops.decoder(
        weights.embedding,
        gathered,
        ops.Norm(weights.final_norm, config.rms_norm_eps),
        weights.lm_head,
        head_tokens,
        rope_rotation(positions, weights.rope_frequencies, factor),
        num_columns,
        config.attention_scale,
    )
