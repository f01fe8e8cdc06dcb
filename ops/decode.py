"""Tokens of a small model on a CPU, one after another, with nothing of the host's in between.

No registered op: it is for models that are not traced, and takes one as addresses that were gathered once.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops.cpu import decode as cpu_decode
from ops.layer import has_layer_kernel
from ops.linear import Matrix, Packed
from ops.norm import Norm


class DecoderLayer(NamedTuple):
    """A layer and its pages, as `decoder_layer` takes them, but for the norms, which all have one `eps`."""

    attention_norm: Float[Tensor, "E"]
    qkv: Matrix
    qkv_bias: Float[Tensor, "QKV"] | None
    query_norm: Float[Tensor, "D"] | None
    key_norm: Float[Tensor, "D"] | None
    output: Matrix
    output_bias: Float[Tensor, "E"] | None
    mlp_norm: Float[Tensor, "E"]
    gate_up: Matrix
    down: Matrix
    keys: Float[Tensor, "NB KV D BS"]
    values: Float[Tensor, "NB KV BS D"]


class Decoder(NamedTuple):
    """A model as `decode` takes it. tensors: what it reads, and the pages that it writes, kept from being freed."""

    model: cpu_decode.CDecoder
    tensors: tuple[Tensor, ...]


def decoder(
    embedding: Matrix,
    layers: tuple[DecoderLayer, ...],
    final_norm: Norm,
    head: Matrix,
    head_tokens: Int[Tensor, "V"] | None,
    rotation: tuple[Float[Tensor, "P D2"], Float[Tensor, "P D2"]],
    num_columns: int,
    scale: float,
) -> Decoder | None:
    """Gather a model; None where `decode` has no kernel for it.

    head_tokens: what the rows of the head stand for, if not for all tokens in order. num_columns: how many of them may
    be chosen. rotation: cosine and sine of all positions there can be.
    """
    first = layers[0]
    kinds = {layer.qkv.blocked.dtype for layer in layers if isinstance(layer.qkv, Packed)}
    if (
        len(kinds) != 1
        or first.keys.is_cuda
        or not all(
            has_layer_kernel((layer.qkv, layer.output, layer.down), layer.gate_up, layer.keys) for layer in layers
        )
        or not (isinstance(head, Packed) and head.is_tiled)
        or not (embedding.has_rows if isinstance(embedding, Packed) else embedding.is_contiguous())
    ):
        return None
    assert isinstance(first.qkv, Packed)
    assert isinstance(first.gate_up, Packed)
    addresses = [[_address(field) for field in layer] for layer in layers]
    table = torch.tensor(addresses, dtype=torch.int64)
    cosine, sine = (part.contiguous() for part in rotation)
    _, kv_heads, head_dim, block_size = first.keys.shape
    model = cpu_decode.CDecoder(
        hidden=len(final_norm.weight),
        intermediate=first.gate_up.features // 2,
        heads=first.qkv.features // head_dim - 2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        vocab=embedding.features if isinstance(embedding, Packed) else len(embedding),
        embedding_is_tiled=isinstance(embedding, Packed),
        embedding=_address(embedding),
        num_layers=len(layers),
        layers_are_int8=kinds == {torch.int8},
        layers=table.data_ptr(),
        final_norm=final_norm.weight.data_ptr(),
        head_rows=head.features,
        head_is_int8=head.blocked.dtype is torch.int8,
        columns=num_columns,
        head=_address(head),
        head_tokens=_address(head_tokens),
        cosine=cosine.data_ptr(),
        sine=sine.data_ptr(),
        eps=final_norm.eps,
        scale=scale,
    )
    read = [embedding, head, head_tokens, final_norm.weight, *(field for layer in layers for field in layer)]
    kept = [field.blocked if isinstance(field, Packed) else field for field in read if field is not None]
    return Decoder(model, (table, cosine, sine, *kept))


def _address(matrix: Matrix | None) -> int:
    if matrix is None:
        return 0
    return (matrix.blocked if isinstance(matrix, Packed) else matrix).data_ptr()


def decode(
    decoder: Decoder,
    counts: Int[Tensor, "B"],
    token_ids: Int[Tensor, "B Q"],
    block_tables: Int[Tensor, "B P"],
    context_lens: Int[Tensor, "B"],
    temperature: Float[Tensor, "B"] | None,
    seed: Int[Tensor, "B"] | None,
) -> Int[Tensor, "B K"]:
    """The next `counts` tokens of each sequence; writes the keys and values of all tokens but the last of them.

    The very tokens that the model's steps would give one by one. counts: not rising; K is the first. What is not wanted
    is 0. token_ids: the last tokens of each sequence, of which keys and values are computed too. context_lens: tokens
    of each with these. temperature, seed: as `ops.draw` takes them, the position being that of the token to come; None
    where all tokens are the likeliest.
    """
    return cpu_decode.decode(decoder.model, counts, token_ids, block_tables, context_lens, temperature, seed)


def decoder_layers(
    decoder: Decoder,
    x: Float[Tensor, "T E"],
    rotation: tuple[Float[Tensor, "T D2"], Float[Tensor, "T D2"]],
    slot_mapping: Int[Tensor, "T"],
    block_tables: Int[Tensor, "B P"],
    query_start: Int[Tensor, "B+1"],
    context_lens: Int[Tensor, "B"],
) -> Float[Tensor, "T E"]:
    """All layers of a step with few query tokens per sequence: the very bits of `layers.block` for each in turn."""
    raise NotImplementedError
