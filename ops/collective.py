"""Collectives of the ranks of a tensor-parallel model, as functions that can be traced.

`group` is the name of a process group; all its ranks must make the same calls in the same order.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def all_reduce(x: Float[Tensor, "*S"], group: str) -> Float[Tensor, "*S"]:
    """Return the sum of `x` over all ranks."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def all_gather_columns(x: Float[Tensor, "R C"], group: str, size: int) -> Float[Tensor, "R sizeC"]:
    """Return the columns of all `size` ranks side by side, in the order of the ranks."""
    functional = torch.ops._c10d_functional
    stacked = functional.wait_tensor(functional.all_gather_into_tensor(x.contiguous(), size, group))
    return stacked.view(size, *x.shape).transpose(0, 1).reshape(x.shape[0], -1)


def broadcast(x: Int[Tensor, "*S"], group: str) -> Int[Tensor, "*S"]:
    """Return the first rank's `x`."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.broadcast(x, 0, group))
