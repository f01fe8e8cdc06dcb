"""Rows of the embedding, which may be the packed matrix of a tied head: one copy serves both."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec.ops.cpu import linear as cpu_linear
from dispec.ops.linear import Matrix, PackedWeight
from dispec.ops.quantized_linear import QuantizedWeight, read_rows
from dispec.ops.registration import register


def embedding(weight: Matrix, token_ids: Int[Tensor, "T"], size: int) -> Float[Tensor, "T E"]:
    """Return rows `token_ids` of a weight [V, size], plain or with `has_readable_rows`; ids are not checked."""
    if isinstance(weight, QuantizedWeight):
        return read_rows(weight, token_ids, size)
    if isinstance(weight, PackedWeight):
        return torch.ops.dispec.unpack_rows(weight.blocked, token_ids, size)
    return weight.index_select(0, token_ids)


register(
    "unpack_rows(Tensor weight, Tensor indices, int size) -> Tensor",
    lambda weight, indices, size: weight.new_empty(indices.shape[0], size),
    cpu=cpu_linear.unpack_rows,
)
