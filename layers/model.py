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
    return weights.embedding[batch.token_ids], rope_rotation(batch.positions, weights.rope_frequencies, factor)


def block(
    x: Float[Tensor, "T E"],
    w: BlockWeights,
    config: ModelConfig,
    batch: Batch,
    rotation: Rotation,
    kv: LayerKV,
) -> Float[Tensor, "T E"]:
    """One transformer layer, residual connections included. Writes the layer's pages."""
    x = attention(x, ops.Norm(w.attention_norm, config.rms_norm_eps), w.attention, config, batch, rotation, kv)
    gated = ops.linear(x, w.mlp.gate_up, norm=ops.Norm(w.mlp_norm, config.rms_norm_eps), is_gated=True)
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
