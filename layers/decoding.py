"""A model gathered for `ops.decoder_layers` and `ops.decode_tokens`."""

from torch import arange

from dispec import ops
from dispec.layers.config import ModelConfig
from dispec.layers.steps import Vocabulary, num_columns
from dispec.layers.types import KVCache, Weights


def decoder(
    weights: Weights, config: ModelConfig, vocabulary: Vocabulary, kv_cache: KVCache, max_positions: int = 0
) -> ops.Decoder | None:
    """Gather a model and its cache; None where there is no kernel for them, as on CUDA.

    vocabulary: the tokens that `ops.decode_tokens` chooses from. max_positions: positions that it may reach.
    """
    if config.shard is not None:
        return None
    blocks, attention = weights.blocks, weights.blocks.attention
    layers = ops.DecoderLayers(
        blocks.attention_norm,
        attention.qkv,
        attention.qkv_bias,
        attention.query_norm,
        attention.key_norm,
        attention.output,
        attention.output_bias,
        blocks.mlp_norm,
        blocks.mlp.gate_up,
        blocks.mlp.down,
        *kv_cache,
    )
    factor = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    positions = arange(max_positions, device=weights.rope_frequencies.device)
    return ops.build_decoder(
        weights.embedding,
        layers,
        ops.Norm(weights.final_norm, config.rms_norm_eps),
        weights.lm_head,
        vocabulary.head_tokens,
        ops.rope_cos_sin(positions, weights.rope_frequencies, factor),
        num_columns(vocabulary, config),
        config.attention_scale,
    )
