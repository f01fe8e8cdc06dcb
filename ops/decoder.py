"""A whole model on a CPU as one C structure: all layers of a step in one call, or a loop of decode steps.

The functions are not registered ops: their steps are never traced, and the structure holds addresses, gathered once.
"""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dispec.ops.cpu import decoder as cpu_decoder
from dispec.ops.cpu import quantized_linear as cpu_quantized_linear
from dispec.ops.cpu.attention import has_cpu_kernel
from dispec.ops.cpu.library import CACHE_TYPES, WeightKind
from dispec.ops.cpu.library import Matrix as CMatrix
from dispec.ops.cpu.linear import TILE
from dispec.ops.kv_cache import scale_rows
from dispec.ops.linear import Matrix, PackedWeight, is_tiled
from dispec.ops.norm import Norm
from dispec.ops.quantized_linear import QuantizedWeight
from dispec.ops.stacking import layer_of

# Most tokens of a sequence for which `decoder_layers` gives the bits of `ops.paged_attention`.
MAX_QUERY_LEN = 16
_MATRICES = ("qkv", "output", "gate_up", "down")


class DecoderLayers(NamedTuple):
    """The weights and the KV cache of all layers, stacked; matrices may be a tuple with one for each layer.

    All norms of a model have the same `eps`.
    """

    attention_norm: Float[Tensor, "L E"]
    qkv: Matrix | tuple[Matrix, ...]
    qkv_bias: Float[Tensor, "L QKV"] | None
    query_norm: Float[Tensor, "L D"] | None
    key_norm: Float[Tensor, "L D"] | None
    output: Matrix | tuple[Matrix, ...]
    output_bias: Float[Tensor, "L E"] | None
    mlp_norm: Float[Tensor, "L E"]
    gate_up: Matrix | tuple[Matrix, ...]
    down: Matrix | tuple[Matrix, ...]
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
    num_layers, _, kv_heads, rows, block_size = layers.keys.shape
    head_dim = rows - scale_rows(layers.keys.dtype)
    fields = {name: _of_layers(field, num_layers) for name, field in layers._asdict().items()}
    by_layer = [{name: field[layer] for name, field in fields.items()} for layer in range(num_layers)]
    if not (_has_readable_rows(embedding) and _is_tiled(head) and all(map(_has_kernel, by_layer))):
        return None
    first = by_layer[0]
    assert not isinstance(head, Tensor)
    cosine, sine = (part.contiguous() for part in rotation)
    c_layers = [
        cpu_decoder.Layer(**{name: _c_field(name, field) for name, field in layer.items()}) for layer in by_layer
    ]
    model = cpu_decoder.Model(
        hidden=len(final_norm.weight),
        intermediate=first["gate_up"].out_features // 2,
        heads=first["qkv"].out_features // head_dim - 2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        cache_type=CACHE_TYPES.get(layers.keys.dtype, 0),
        vocab=len(embedding) if isinstance(embedding, Tensor) else embedding.out_features,
        embedding=_c_matrix(embedding),
        num_layers=num_layers,
        layers=(cpu_decoder.Layer * num_layers)(*c_layers),
        final_norm=final_norm.weight.data_ptr(),
        head_rows=head.out_features,
        columns=num_columns,
        head=_c_matrix(head),
        head_tokens=None if head_tokens is None else head_tokens.data_ptr(),
        cosine=cosine.data_ptr(),
        sine=sine.data_ptr(),
        eps=final_norm.eps,
        scale=scale,
    )
    weights = [embedding, head, *(field for layer in by_layer for field in layer.values() if field is not None)]
    read = (*map(_tensor, weights), head_tokens, final_norm.weight, cosine, sine)
    return Decoder(model, tuple(tensor for tensor in read if tensor is not None))


def _of_layers(stacked: Matrix | tuple[Matrix, ...] | None, num_layers: int) -> tuple[Any, ...]:
    if stacked is None:
        return (None,) * num_layers
    if type(stacked) is tuple:
        return stacked
    return tuple(layer_of(cast(Matrix, stacked), layer) for layer in range(num_layers))


def _has_kernel(layer: dict[str, Any]) -> bool:
    """Return whether all weights of a layer are in tiles, and the pages of a size with a kernel."""
    keys = layer["keys"]
    rows, block_size = keys.shape[2:]
    return (
        all(_is_tiled(layer[name]) for name in _MATRICES)
        and layer["gate_up"].out_features % (2 * TILE) == 0
        and layer["attention_norm"].dtype is torch.bfloat16
        and has_cpu_kernel(keys.dtype, rows - scale_rows(keys.dtype), block_size)
    )


def _is_tiled(weight: Any) -> bool:
    if isinstance(weight, QuantizedWeight):
        return weight.column_order is None and weight.data.device.type == "cpu"
    return is_tiled(weight)


def _has_readable_rows(embedding: Matrix) -> bool:
    if isinstance(embedding, Tensor):
        return embedding.is_contiguous()
    return embedding.has_readable_rows and _is_tiled(embedding)


def _tensor(matrix: Matrix) -> Tensor:
    if isinstance(matrix, QuantizedWeight):
        return matrix.data
    return matrix.blocked if isinstance(matrix, PackedWeight) else matrix


def _c_matrix(matrix: Matrix) -> CMatrix:
    if isinstance(matrix, QuantizedWeight):
        return cpu_quantized_linear.matrix(matrix.data, matrix.kind, matrix.group_size, matrix.has_offsets)
    kind = WeightKind.BFLOAT16 if isinstance(matrix, PackedWeight) else WeightKind.PLAIN
    return CMatrix(_tensor(matrix).data_ptr(), kind)


def _c_field(name: str, field: Matrix | None) -> CMatrix | int | None:
    if name in _MATRICES:
        assert field is not None
        return _c_matrix(field)
    return None if field is None else _tensor(field).data_ptr()


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
