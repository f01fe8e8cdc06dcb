"""A whole model on a CPU as one C structure: all layers of a step in one call, or a loop of decode steps.

The functions are not registered ops: their steps are never traced, and the structure holds addresses, gathered once.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dispec.ops.cpu import decoder as cpu_decoder
from dispec.ops.cpu.attention import has_cpu_kernel
from dispec.ops.cpu.library import CACHE_TYPES
from dispec.ops.cpu.linear import TILE
from dispec.ops.kv_cache import scale_rows
from dispec.ops.linear import Matrix, PackedWeight, is_tiled
from dispec.ops.norm import Norm
from dispec.ops.quantized_linear import QuantizedWeight


class DecoderLayers(NamedTuple):
    """The weights and the KV cache of all layers, stacked. All norms of a model have the same `eps`."""

    attention_norm: Float[Tensor, "L E"]
    qkv: Matrix
    qkv_bias: Float[Tensor, "L QKV"] | None
    query_norm: Float[Tensor, "L D"] | None
    key_norm: Float[Tensor, "L D"] | None
    output: Matrix
    output_bias: Float[Tensor, "L E"] | None
    mlp_norm: Float[Tensor, "L E"]
    gate_up: Matrix
    down: Matrix
    keys: Shaped[Tensor, "L NB KV DP BS"]
    values: Shaped[Tensor, "L NB KV BS DP"]


class Decoder(NamedTuple):
    """A model as C++ reads it. tensors: the owners of the addresses in it, which it keeps alive."""

    model: cpu_decoder.Model
    tensors: tuple[Tensor, ...]


def build_decoder(
    embedding: Matrix,
    layers: DecoderLayers,
    final_norm: Norm,
    head: Matrix,
    head_tokens: Int[Tensor, "V"] | None,
    rotation: tuple[Float[Tensor, "S D2"], Float[Tensor, "S D2"]],
    num_columns: int,
    scale: float,
) -> Decoder | None:
    """Gather a model for `decoder_layers` and `decode_tokens`; return None where they have no kernel for it.

    head_tokens: the tokens of the head's rows, None for all tokens in order. num_columns: rows of the head that may be
    sampled. rotation: cosine and sine of all positions that `decode_tokens` may reach. scale: multiplies attention
    scores.
    """
    qkv, gate_up = layers.qkv, layers.gate_up
    if (
        not (isinstance(qkv, PackedWeight) and isinstance(gate_up, PackedWeight) and is_tiled(head))
        or not _has_kernel(qkv, layers)
        or isinstance(embedding, QuantizedWeight)
        or not (embedding.has_readable_rows if isinstance(embedding, PackedWeight) else embedding.is_contiguous())
    ):
        return None
    cosine, sine = (part.contiguous() for part in rotation)
    num_layers, _, kv_heads, rows, block_size = layers.keys.shape
    head_dim = rows - scale_rows(layers.keys.dtype)
    by_layer = zip(*(_addresses(field, num_layers) for field in layers), strict=True)
    c_layers = [cpu_decoder.Layer(**dict(zip(layers._fields, addresses, strict=True))) for addresses in by_layer]
    model = cpu_decoder.Model(
        hidden=len(final_norm.weight),
        intermediate=gate_up.out_features // 2,
        heads=qkv.out_features // head_dim - 2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        cache_type=CACHE_TYPES.get(layers.keys.dtype, 0),
        vocab=embedding.out_features if isinstance(embedding, PackedWeight) else len(embedding),
        embedding_is_tiled=isinstance(embedding, PackedWeight),
        embedding=_tensor(embedding).data_ptr(),
        num_layers=num_layers,
        layers_are_int8=qkv.blocked.dtype is torch.int8,
        layers=(cpu_decoder.Layer * num_layers)(*c_layers),
        final_norm=final_norm.weight.data_ptr(),
        head_rows=head.out_features,
        head_is_int8=head.blocked.dtype is torch.int8,
        columns=num_columns,
        head=head.blocked.data_ptr(),
        head_tokens=None if head_tokens is None else head_tokens.data_ptr(),
        cosine=cosine.data_ptr(),
        sine=sine.data_ptr(),
        eps=final_norm.eps,
        scale=scale,
    )
    read = (embedding, head, head_tokens, final_norm.weight, cosine, sine, *layers)
    return Decoder(model, tuple(_tensor(field) for field in read if field is not None))


def _has_kernel(qkv: PackedWeight, layers: DecoderLayers) -> bool:
    """Return whether all weights are in tiles of one dtype, and the pages of a size with a kernel."""
    matrices = (qkv, layers.output, layers.gate_up, layers.down)
    rows, block_size = layers.keys.shape[3:]
    return (
        all(
            isinstance(matrix, PackedWeight)
            and isinstance(matrix.blocked, Tensor)  # oneDNN's layout has a tensor for each layer
            and matrix.blocked.dtype is qkv.blocked.dtype
            for matrix in matrices
        )
        and isinstance(layers.gate_up, PackedWeight)
        and layers.gate_up.out_features % (2 * TILE) == 0
        and layers.attention_norm.dtype is torch.bfloat16
        and has_cpu_kernel(layers.keys.dtype, rows - scale_rows(layers.keys.dtype), block_size)
    )


def _addresses(stacked: Matrix | None, num_layers: int) -> list[int | None]:
    """Return the address of each layer's part."""
    if stacked is None:
        return [None] * num_layers
    return [layer.data_ptr() for layer in _tensor(stacked)]


def _tensor(matrix: Matrix) -> Tensor:
    assert not isinstance(matrix, QuantizedWeight)
    return matrix.blocked if isinstance(matrix, PackedWeight) else matrix


def decoder_layers(
    decoder: Decoder,
    x: Float[Tensor, "T E"],
    rotation: tuple[Float[Tensor, "T D2"], Float[Tensor, "T D2"]],
    slot_mapping: Int[Tensor, "T"],
    block_tables: Int[Tensor, "B P"],
    query_start: Int[Tensor, "B+1"],
    context_lens: Int[Tensor, "B"],
) -> Float[Tensor, "T E"]:
    """Compute all layers of a step with few query tokens per sequence; write the tokens' keys and values.

    The bits are those of `layers.model.decoder_layer` for each layer in turn.
    """
    return cpu_decoder.layers(decoder.model, x, *rotation, slot_mapping, block_tables, query_start, context_lens)


def decode_tokens(
    decoder: Decoder,
    counts: Int[Tensor, "B"],
    token_ids: Int[Tensor, "B Q"],
    block_tables: Int[Tensor, "B P"],
    context_lens: Int[Tensor, "B"],
    temperature: Float[Tensor, "B"] | None,
    seed: Int[Tensor, "B"] | None,
) -> Int[Tensor, "B K"]:
    """Return the next `counts` tokens of each sequence, as the model's steps would give them one by one.

    Writes the keys and values of all tokens but the last new one. counts: in descending order; K is the first. Tokens
    beyond a sequence's count are 0. token_ids: the last tokens of each sequence; their keys and values are computed
    too. context_lens: tokens of each sequence, these included. temperature, seed: as in `ops.sample`, where the
    position is that of the next token; None where every token is greedy.
    """
    return cpu_decoder.decode(decoder.model, counts, token_ids, block_tables, context_lens, temperature, seed)
