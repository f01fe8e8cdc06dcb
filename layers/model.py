"""The model as functions: `forward` is `embed`, `block` for each layer, `logits`."""

from jaxtyping import Float
from torch import Tensor

import ops
from layers.attention import Rotation, attention
from layers.config import ModelConfig
from layers.rope import rope_rotation
from layers.types import Batch, BlockWeights, KVCache, LayerKV, Weights


def embed(weights: Weights, config: ModelConfig, batch: Batch) -> tuple[Float[Tensor, "T E"], Rotation]:
    """The tokens' embeddings and the rotation of their positions."""
    factor = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    x = ops.embedding(weights.embedding, batch.token_ids, config.hidden_size)
    return x, rope_rotation(batch.positions, weights.rope_frequencies, factor)


def block(
    x: Float[Tensor, "T E"],
    w: BlockWeights,
    config: ModelConfig,
    batch: Batch,
    rotation: Rotation,
    kv: LayerKV,
) -> Float[Tensor, "T E"]:
    """One transformer layer, residual connections included. Writes the layer's pages."""
    attention_norm, mlp_norm = (ops.Norm(weight, config.rms_norm_eps) for weight in (w.attention_norm, w.mlp_norm))
    a, mlp = w.attention, w.mlp
    if batch.query_len is not None and ops.has_layer_kernel((a.qkv, a.output, mlp.down), mlp.gate_up, kv.keys):
        return ops.decoder_layer(
            x,
            attention_norm,
            a.qkv,
            a.qkv_bias,
            a.query_norm,
            a.key_norm,
            a.output,
            a.output_bias,
            mlp_norm,
            mlp.gate_up,
            mlp.down,
            rotation,
            *kv,
            batch.slot_mapping,
            batch.block_tables,
            batch.query_start,
            batch.context_lens,
            config.attention_scale,
        )
    x = attention(x, attention_norm, a, config, batch, rotation, kv)
    gated = ops.linear(x, mlp.gate_up, norm=mlp_norm, is_gated=True)
    return ops.linear(gated, w.mlp.down, residual=x)


def logits(x: Float[Tensor, "R E"], weights: Weights, config: ModelConfig) -> Float[Tensor, "R V"]:
    """Logits, in the weights' type, of the rows that the caller selected: the head is never computed for others."""
    return ops.linear(x, weights.lm_head, norm=ops.Norm(weights.final_norm, config.rms_norm_eps))


def forward(weights: Weights, config: ModelConfig, batch: Batch, kv_cache: KVCache) -> Float[Tensor, "R V"]:
    """One step of the model: writes the step's keys and values to the cache, returns the wanted rows' logits."""
    x, rotation = embed(weights, config, batch)
    for w, kv in zip(weights.blocks, kv_cache, strict=True):
        x = block(x, w, config, batch, rotation, kv)
    return logits(x[batch.logits_indices], weights, config)
