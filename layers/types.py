"""The values that flow through the model, and the letters their shapes are written in.

====  =====================================  ====  ==================================
T     tokens in the step                     E     hidden size
B     sequences in the step                  F     intermediate size of the MLP
Q     query tokens per sequence              V     vocabulary size
P     blocks per sequence                    L     layers
H     query heads                            NB    blocks in the KV cache
KV    key/value heads                        BS    tokens per block (block size)
D     head dimension                         R     rows whose logits are wanted
D2    half of it, the pairs that rotate
====  =====================================  ====  ==================================

Everything here is a named tuple of tensors and plain values: a pytree that torch.compile, tests and a
debugger all read the same way. Weights and cache are stacked by layer, which keeps a compiled step's inputs at about
twenty tensors: its host cost grows with their number.
"""

from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from dispec.ops import Matrix, PackedWeight


class AttentionWeights(NamedTuple):
    """Weights of one attention layer. `qkv` stacks the query, key and value projections along its rows."""

    qkv: Matrix
    output: Matrix
    qkv_bias: Float[Tensor, "QKV"] | None = None
    output_bias: Float[Tensor, "E"] | None = None
    query_norm: Float[Tensor, "D"] | None = None
    key_norm: Float[Tensor, "D"] | None = None


class MlpWeights(NamedTuple):
    """Weights of one gated MLP. `gate_up` stacks the gate and up projections along its rows."""

    gate_up: Matrix
    down: Matrix


class BlockWeights(NamedTuple):
    """Weights of one transformer layer."""

    attention_norm: Float[Tensor, "E"]
    attention: AttentionWeights
    mlp_norm: Float[Tensor, "E"]
    mlp: MlpWeights


class Weights(NamedTuple):
    """All weights of a model. Each `Matrix` is in the layout that `ops.pack` chose.

    Every field of `blocks` has the layers as an additional first dimension, or is a tuple with a `PackedWeight` for
    each layer where their layout cannot be stacked; `layers` gives one view per layer.
    `rope_frequencies` is not read from a checkpoint but follows from the config (radians per position). A tied
    `embedding` is the very `lm_head` where its layout lets rows be read from it.
    """

    embedding: Matrix
    blocks: BlockWeights
    final_norm: Float[Tensor, "E"]
    lm_head: Matrix
    rope_frequencies: Float[Tensor, "D2"]


class LayerKV(NamedTuple):
    """The pages of one layer: those of all layers and its number, or with None its own alone."""

    keys: Float[Tensor, "*L NB KV D BS"]
    values: Float[Tensor, "*L NB KV BS D"]
    layer: int | None = None


class KVCache(NamedTuple):
    """The pages of all layers.

    Keys hold positions innermost, so that scores vectorise over positions without horizontal sums; values
    hold the head dimension innermost, for the same reason in the weighted sum.
    """

    keys: Float[Tensor, "L NB KV D BS"]
    values: Float[Tensor, "L NB KV BS D"]

    @property
    def block_size(self) -> int:
        return self.keys.shape[4]

    def layers(self) -> tuple[LayerKV, ...]:
        """The pages of each layer."""
        return tuple(LayerKV(self.keys, self.values, layer) for layer in range(self.keys.shape[0]))


def layers(blocks: BlockWeights) -> tuple[BlockWeights, ...]:
    """The weights of each layer, as views of stacked ones."""
    size = len(blocks.attention_norm)
    columns = zip(
        _unstack(blocks.attention_norm, size),
        zip(*(_unstack(field, size) for field in blocks.attention), strict=True),
        _unstack(blocks.mlp_norm, size),
        zip(*(_unstack(field, size) for field in blocks.mlp), strict=True),
        strict=True,
    )
    return tuple(
        BlockWeights(attention_norm, AttentionWeights(*attention), mlp_norm, MlpWeights(*mlp))
        for attention_norm, attention, mlp_norm, mlp in columns
    )


def _unstack(stacked: Matrix | tuple[PackedWeight, ...] | None, size: int) -> tuple[Any, ...]:
    if stacked is None:
        return (None,) * size
    if isinstance(stacked, PackedWeight):
        return tuple(PackedWeight(one, stacked.out_features) for one in stacked.blocked.unbind(0))
    return stacked.unbind(0) if isinstance(stacked, Tensor) else stacked


class Batch(NamedTuple):
    """What one forward pass computes.

    Sequence `b` owns rows `query_start[b] : query_start[b + 1]` of the token axis; they are its last tokens,
    and `context_lens[b]` counts all its tokens up to and including them. Block 0 of the cache is never given
    to a sequence: padding tokens have slots in it.

    `query_len` is the number of tokens of every sequence where all have the same number (1 in decode, k + 1
    when k draft tokens are verified), so that T = B * query_len; it is None in a ragged step. Compiled steps derive it
    from the shapes, as a symbolic value: decode and verification are one graph. `logits_indices` None wants the logits
    of all tokens.
    """

    token_ids: Int[Tensor, "T"]
    positions: Int[Tensor, "T"]
    slot_mapping: Int[Tensor, "T"]
    block_tables: Int[Tensor, "B P"]
    query_start: Int[Tensor, "B+1"]
    context_lens: Int[Tensor, "B"]
    logits_indices: Int[Tensor, "R"] | None
    query_len: int | None = None


class Sampling(NamedTuple):
    """How to draw a token for each of the R rows.

    `temperature` 0 is greedy. `seed` and `position` are the counter of the random numbers: the same pair gives
    the same noise whatever else is in the batch.
    """

    temperature: Float[Tensor, "R"]
    seed: Int[Tensor, "R"]
    position: Int[Tensor, "R"]


class Filters(NamedTuple):
    """Which tokens a draw may choose, by their probabilities: `top_k` is V where it is off, `top_p` 1, `min_p` 0."""

    top_k: Int[Tensor, "R"]
    top_p: Float[Tensor, "R"]
    min_p: Float[Tensor, "R"]


class Edits(NamedTuple):
    """Changes of N single logits, for penalties and biases.

    `place` is row * V + token. The logit is divided by `scale` where positive and multiplied by it where negative,
    then `addend` is added. Entries of scale 1 and addend 0 are padding and change nothing; of the others no two
    have the same place.
    """

    place: Int[Tensor, "N"]
    scale: Float[Tensor, "N"]
    addend: Float[Tensor, "N"]


class Logprobs(NamedTuple):
    """Natural log-probabilities of a token in each row, of the likeliest tokens, and the token's rank from 1."""

    chosen: Float[Tensor, "R"]
    rank: Int[Tensor, "R"]
    top: Float[Tensor, "R K"]
    top_token_ids: Int[Tensor, "R K"]
