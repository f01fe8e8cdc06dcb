"""The model as functions: `forward` is `embed`, `decoder_layer` for each layer, `logits`."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec import ops
from dispec.layers.attention import CosSin, attention
from dispec.layers.config import ModelConfig
from dispec.layers.types import Batch, KVCache, LayerKV, LayerWeights, Weights, unstack_layers


def embed(weights: Weights, config: ModelConfig, batch: Batch) -> tuple[Float[Tensor, "T E"], CosSin]:
    """Return the tokens' embeddings, and the cosine and sine of their rotary positions."""
    x = _embedding(weights, config, batch.token_ids)
    return x, ops.rope_cos_sin(batch.positions, weights.rope_frequencies, config.rope_attention_factor)


def _embedding(weights: Weights, config: ModelConfig, token_ids: Int[Tensor, "T"]) -> Float[Tensor, "T E"]:
    dtype = weights.final_norm.dtype  # rows of a quantised embedding are bfloat16
    if config.shard is None:
        return ops.embedding(weights.embedding, token_ids, config.hidden_size).to(dtype)
    rows = config.shard.vocab_rows(config.vocab_size)
    own = token_ids - config.shard.rank * rows
    is_own = (own >= 0) & (own < rows)
    x = ops.embedding(weights.embedding, own.clamp(0, rows - 1), config.hidden_size).to(dtype)
    return ops.all_reduce(torch.where(is_own[:, None], x, 0.0), config.shard.group)


def decoder_layer(
    x: Float[Tensor, "T E"],
    w: LayerWeights,
    config: ModelConfig,
    batch: Batch,
    cos_sin: CosSin,
    kv: LayerKV,
) -> Float[Tensor, "T E"]:
    """Compute one transformer layer, residual connections included. Writes the layer's KV cache."""
    attention_norm, mlp_norm = (ops.Norm(weight, config.rms_norm_eps) for weight in (w.attention_norm, w.mlp_norm))
    x = attention(x, attention_norm, w.attention, config, batch, cos_sin, kv)
    gated = ops.linear(x, w.mlp.gate_up, norm=mlp_norm, is_gated=True)
    if config.shard is None:
        return ops.linear(gated, w.mlp.down, residual=x)
    return x + ops.all_reduce(ops.linear(gated, w.mlp.down), config.shard.group)


def hidden_states(
    weights: Weights, config: ModelConfig, batch: Batch, kv_cache: KVCache, decoder: ops.Decoder | None = None
) -> Float[Tensor, "T E"]:
    """Compute all layers of one step: write the step's keys and values to the cache, return the last hidden states.

    decoder: the same weights and cache for `ops.decoder_layers`, which computes steps with few tokens of each sequence
        in one call, with bitwise equal results.
    """
    x, cos_sin = embed(weights, config, batch)
    if decoder is not None and (batch.query_len or int(batch.query_start.diff().max())) <= ops.MAX_QUERY_LEN:
        return ops.decoder_layers(
            decoder, x, cos_sin, batch.slot_mapping, batch.block_tables, batch.query_start, batch.context_lens
        )
    for w, kv in zip(unstack_layers(weights.layers), kv_cache.layers(), strict=True):
        x = decoder_layer(x, w, config, batch, cos_sin, kv)
    return x


def select_rows(x: Float[Tensor, "T E"], batch: Batch) -> Float[Tensor, "R E"]:
    """Return the rows that `batch.logits_indices` selects."""
    if batch.logits_indices is None:
        return x
    # Unlike x[indices], a CPU selects a few rows in one thread: see `ops/cpu/thread_pool.cpp`.
    return x.index_select(0, batch.logits_indices)


def logits(x: Float[Tensor, "R E"], weights: Weights, config: ModelConfig) -> Float[Tensor, "R V"]:
    """Return the logits of hidden states, in the weights' dtype."""
    found = ops.linear(x, weights.lm_head, norm=ops.Norm(weights.final_norm, config.rms_norm_eps))
    if config.shard is None:
        return found
    return ops.all_gather_columns(found, config.shard.group, config.shard.size)[:, : config.vocab_size]


def forward(weights: Weights, config: ModelConfig, batch: Batch, kv_cache: KVCache) -> Float[Tensor, "R V"]:
    """Run one step: write its keys and values to the cache, return the logits of the selected rows."""
    return logits(select_rows(hidden_states(weights, config, batch, kv_cache), batch), weights, config)
