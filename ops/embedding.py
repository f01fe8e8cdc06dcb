"""Rows of the embedding, which may be the packed matrix of a tied head: no second copy of it is kept."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec.ops.cpu import linear as cpu_linear
from dispec.ops.linear import Matrix, PackedWeight

_library = torch.library.Library("dispec", "FRAGMENT")
_library.define("tiled_rows(Tensor weight, Tensor indices, int size) -> Tensor")


def embedding(weight: Matrix, token_ids: Int[Tensor, "T"], size: int) -> Float[Tensor, "T E"]:
    """Rows `token_ids` of a weight [V, size], plain or packed in our tiles; ids are not checked."""
    if isinstance(weight, PackedWeight):
        return torch.ops.dispec.tiled_rows(weight.blocked, token_ids, size)
    return weight.index_select(0, token_ids)


_library.impl("tiled_rows", cpu_linear.rows, "CPU")
torch.library.register_fake(
    "dispec::tiled_rows", lambda weight, indices, size: weight.new_empty(indices.shape[0], size), lib=_library
)
