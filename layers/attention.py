"""One attention layer: project, rotate, write the KV cache, attend."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from dispec import ops
from dispec.layers.config import ModelConfig
from dispec.layers.types import AttentionWeights, Batch, LayerKV

CosSin = tuple[Float[Tensor, "T D2"], Float[Tensor, "T D2"]]


def attention(
    x: Float[Tensor, "T E"],
    norm: ops.Norm,
    w: AttentionWeights,
    config: ModelConfig,
    batch: Batch,
    cos_sin: CosSin,
    kv: LayerKV,
) -> Float[Tensor, "T E"]:
    """Return `x` plus the grouped-query attention (arXiv:2305.13245) of its norm over each sequence's KV cache.

    The tokens' keys and values are written to `kv` first, so that they attend to one another through the cache.
    """
    query_norm = None if w.query_norm is None else ops.Norm(w.query_norm, config.rms_norm_eps)
    key_norm = None if w.key_norm is None else ops.Norm(w.key_norm, config.rms_norm_eps)
    query = ops.qkv_rope_write(
        x, w.qkv, w.qkv_bias, norm, cos_sin, kv.keys, kv.values, batch.slot_mapping, query_norm, key_norm, kv.layer
    )
    attended = ops.paged_attention(
        query,
        kv.keys,
        kv.values,
        batch.block_tables,
        batch.query_start,
        batch.context_lens,
        batch.query_len,
        config.attention_scale,
        kv.layer,
    )
    attended = rearrange(attended, "t h d -> t (h d)")
    if config.shard is None:
        return ops.linear(attended, w.output, w.output_bias, residual=x)
    # The output bias is zero in all ranks but the first. The residual is larger than what is added to it: inside of the
    # sum over the ranks it would cost a second rounding of its own size.
    attended = ops.linear(attended, w.output, w.output_bias)
    return x + ops.all_reduce(attended, config.shard.group)
