"""The values that flow through the model, and the letters of their shapes.

====  =====================================  ====  ==================================
T     tokens in the step                     E     hidden size
B     sequences in the step                  F     intermediate size of the MLP
Q     query tokens per sequence              V     vocabulary size
P     blocks per sequence                    L     layers
H     query heads                            NB    blocks in the KV cache
KV    key/value heads                        BS    tokens per block (block size)
D     head dimension                         R     rows of logits
D2    half of D, the rotated pairs            DP    D, or D + 4 in a quantised KV cache
====  =====================================  ====  ==================================

Each type is a named tuple of tensors and plain values, a pytree to torch.compile. Weights and cache are stacked by
layer, which keeps a compiled step's inputs at about twenty tensors: its host time grows with their number.
"""

from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dispec.ops import Matrix, layer_of


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


class LayerWeights(NamedTuple):
    """Weights of one transformer layer."""

    attention_norm: Float[Tensor, "E"]
    attention: AttentionWeights
    mlp_norm: Float[Tensor, "E"]
    mlp: MlpWeights


class Weights(NamedTuple):
    """All weights of a model. Each `Matrix` is in the layout that `ops.pack` chose.

    layers: every field has the layers as an additional first dimension, or is a tuple with a matrix for each layer
        where layouts differ or cannot be stacked. `unstack_layers` returns one view for each layer.
    embedding: the same object as `lm_head` where the two are tied and rows can be read from the packed layout.
    rope_frequencies: radians per position. They follow from the config, not from a checkpoint.
    """

    embedding: Matrix
    layers: LayerWeights
    final_norm: Float[Tensor, "E"]
    lm_head: Matrix
    rope_frequencies: Float[Tensor, "D2"]


def unstack_layers(stacked: LayerWeights) -> tuple[LayerWeights, ...]:
    """Return the weights of each layer, as views."""
    num_layers = len(stacked.attention_norm)
    fields = zip(
        _unstack(stacked.attention_norm, num_layers),
        zip(*(_unstack(field, num_layers) for field in stacked.attention), strict=True),
        _unstack(stacked.mlp_norm, num_layers),
        zip(*(_unstack(field, num_layers) for field in stacked.mlp), strict=True),
        strict=True,
    )
    return tuple(
        LayerWeights(attention_norm, AttentionWeights(*attention), mlp_norm, MlpWeights(*mlp))
        for attention_norm, attention, mlp_norm, mlp in fields
    )


def _unstack(stacked: Matrix | tuple[Matrix, ...] | None, num_layers: int) -> tuple[Any, ...]:
    if stacked is None:
        return (None,) * num_layers
    if type(stacked) is tuple:
        return stacked
    return tuple(layer_of(cast(Matrix, stacked), layer) for layer in range(num_layers))


class LayerKV(NamedTuple):
    """The KV cache of one layer: that of all layers and the layer's number, or its own tensors and None."""

    keys: Shaped[Tensor, "*L NB KV DP BS"]
    values: Shaped[Tensor, "*L NB KV BS DP"]
    layer: int | None = None


class KVCache(NamedTuple):
    """The KV cache of all layers.

    Scores vectorise over positions and the weighted sum over the head dimension, without horizontal sums: so positions
    are innermost in keys, and the head dimension is innermost in values.
    """

    keys: Shaped[Tensor, "L NB KV DP BS"]
    values: Shaped[Tensor, "L NB KV BS DP"]

    @property
    def block_size(self) -> int:
        return self.keys.shape[4]

    def layers(self) -> tuple[LayerKV, ...]:
        """Return the KV cache of each layer."""
        return tuple(LayerKV(self.keys, self.values, layer) for layer in range(self.keys.shape[0]))


_Array = TypeVar("_Array", Tensor, np.ndarray)


def slots_of(block_ids: _Array, positions: _Array, block_size: int) -> _Array:
    """Return the slot of each position in the KV cache: its block's first slot plus its offset in the block."""
    return block_ids * block_size + positions % block_size


class Batch(NamedTuple):
    """The inputs of one forward pass.

    Sequence `b` has the tokens `query_start[b] : query_start[b + 1]`, which are its last ones; `context_lens[b]` counts
    all its tokens up to and including them. Block 0 of the cache belongs to no sequence: padding tokens have slots in
    it.

    logits_indices: the tokens that get logits, None for all tokens.
    query_len: the number of tokens of every sequence in a uniform step, so that T = B * query_len: 1 in decode, k + 1
        where k draft tokens are verified. None in a ragged step. Compiled steps derive it from the shapes, as a
        symbolic value, so that decode and verification are one graph.
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
    """How each of the R rows is sampled.

    temperature: 0 is greedy.
    seed, position: the counter of the random numbers. The same pair gives the same noise in any batch.
    """

    temperature: Float[Tensor, "R"]
    seed: Int[Tensor, "R"]
    position: Int[Tensor, "R"]


class SamplingFilters(NamedTuple):
    """The limits of each row's sampled tokens by probability. Off is `top_k` V, `top_p` 1 and `min_p` 0."""

    top_k: Int[Tensor, "R"]
    top_p: Float[Tensor, "R"]
    min_p: Float[Tensor, "R"]


class Penalties(NamedTuple):
    """Changes of N single logits, by penalties and biases.

    indices: row * V + token id, each at most once.
    scale: divides a positive logit and multiplies a negative one. addend: is added afterwards.
    An entry of scale 1 and addend 0 changes nothing: it is padding, at any index.
    """

    indices: Int[Tensor, "N"]
    scale: Float[Tensor, "N"]
    addend: Float[Tensor, "N"]


class Logprobs(NamedTuple):
    """Natural log-probabilities of one token and of the K likeliest tokens of each row.

    rank: of the one token, 1 for the likeliest.
    """

    logprob: Float[Tensor, "R"]
    rank: Int[Tensor, "R"]
    top_logprobs: Float[Tensor, "R K"]
    top_token_ids: Int[Tensor, "R K"]
