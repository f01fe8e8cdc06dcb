"""The whole model as one value for the CPU's `ops.decoder_layers` and `ops.decode_tokens`."""

from torch import arange

from dispec import ops
from dispec.layers.config import ModelConfig
from dispec.layers.steps import Vocabulary
from dispec.layers.types import KVCache, Weights


def build_decoder(
    weights: Weights, config: ModelConfig, vocabulary: Vocabulary, kv_cache: KVCache, max_positions: int = 0
) -> ops.Decoder | None:
    """Return a model and its cache as one value; None where they have no such kernel, as on CUDA.

    vocabulary: the tokens that `ops.decode_tokens` samples from. max_positions: exclusive bound of its positions.
    """
    if config.shard is not None:
        return None
    layers, attention = weights.layers, weights.layers.attention
    positions = arange(max_positions, device=weights.rope_frequencies.device)
    return ops.build_decoder(
        weights.embedding,
        ops.DecoderLayers(
            attention_norm=layers.attention_norm,
            qkv=attention.qkv,
            qkv_bias=attention.qkv_bias,
            query_norm=attention.query_norm,
            key_norm=attention.key_norm,
            output=attention.output,
            output_bias=attention.output_bias,
            mlp_norm=layers.mlp_norm,
            gate_up=layers.mlp.gate_up,
            down=layers.mlp.down,
            keys=kv_cache.keys,
            values=kv_cache.values,
        ),
        ops.Norm(weights.final_norm, config.rms_norm_eps),
        weights.lm_head,
        vocabulary.head_tokens,
        ops.rope_cos_sin(positions, weights.rope_frequencies, config.rope_attention_factor),
        vocabulary.num_head_tokens(config),
        config.attention_scale,
    )
