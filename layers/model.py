"""The model as functions: `forward` is `embed`, `block` for each layer, `logits`."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec import ops
from dispec.layers.attention import Rotation, attention
from dispec.layers.config import ModelConfig
from dispec.layers.types import Batch, BlockWeights, KVCache, LayerKV, Weights, layers


def embed(weights: Weights, config: ModelConfig, batch: Batch) -> tuple[Float[Tensor, "T E"], Rotation]:
    """The tokens' embeddings and the rotation of their positions."""
    factor = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    x = _embedding(weights, config, batch.token_ids)
    return x, ops.rope_cos_sin(batch.positions, weights.rope_frequencies, factor)


def _embedding(weights: Weights, config: ModelConfig, token_ids: Int[Tensor, "T"]) -> Float[Tensor, "T E"]:
    if config.shard is None:
        return ops.embedding(weights.embedding, token_ids, config.hidden_size)
    rows = config.shard.vocab_rows(config.vocab_size)
    own = token_ids - config.shard.rank * rows
    is_own = (own >= 0) & (own < rows)
    x = ops.embedding(weights.embedding, own.clamp(0, rows - 1), config.hidden_size)
    return ops.all_reduce(torch.where(is_own[:, None], x, 0.0), config.shard.group)


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
    x = attention(x, attention_norm, w.attention, config, batch, rotation, kv)
    gated = ops.linear(x, w.mlp.gate_up, norm=mlp_norm, is_gated=True)
    if config.shard is None:
        return ops.linear(gated, w.mlp.down, residual=x)
    return x + ops.all_reduce(ops.linear(gated, w.mlp.down), config.shard.group)


def hidden_states(
    weights: Weights, config: ModelConfig, batch: Batch, kv_cache: KVCache, decoder: ops.Decoder | None = None
) -> Float[Tensor, "T E"]:
    """All layers of one step: writes the step's keys and values to the cache, returns what the head reads.

    decoder: the same weights and cache, gathered for `ops.decoder_layers`, which then computes uniform steps: the same
    bits in one call.
    """
    x, rotation = embed(weights, config, batch)
    if decoder is not None and batch.query_len is not None:
        return ops.decoder_layers(
            decoder, x, rotation, batch.slot_mapping, batch.block_tables, batch.query_start, batch.context_lens
        )
    for w, kv in zip(layers(weights.blocks), kv_cache.layers(), strict=True):
        x = block(x, w, config, batch, rotation, kv)
    return x


def logits(x: Float[Tensor, "R E"], weights: Weights, config: ModelConfig) -> Float[Tensor, "R V"]:
    """Logits, in the weights' type, of the rows that the caller selected: the head is never computed for others."""
    found = ops.linear(x, weights.lm_head, norm=ops.Norm(weights.final_norm, config.rms_norm_eps))
    if config.shard is None:
        return found
    return ops.all_gather_columns(found, config.shard.group, config.shard.size)[:, : config.vocab_size]


def wanted_rows(x: Float[Tensor, "T E"], batch: Batch) -> Float[Tensor, "R E"]:
    """The rows whose logits the step wants."""
    if batch.logits_indices is None:
        return x
    # Unlike x[indices], a CPU selects a few rows in one thread: see `ops/cpu/thread_pool.cpp`.
    return x.index_select(0, batch.logits_indices)


def forward(weights: Weights, config: ModelConfig, batch: Batch, kv_cache: KVCache) -> Float[Tensor, "R V"]:
    """One step of the model: writes the step's keys and values to the cache, returns the wanted rows' logits."""
    return logits(wanted_rows(hidden_states(weights, config, batch, kv_cache), batch), weights, config)
