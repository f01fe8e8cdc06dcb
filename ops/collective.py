"""What the ranks of a tensor-parallel model say to one another, as functions that can be traced.

`group` is the name of a process group, which all its ranks give in the same order of calls. Where there is no group
nothing is said: a model on one device has no ranks.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def all_reduce(x: Float[Tensor, "*S"], group: str) -> Float[Tensor, "*S"]:
    """The sum of every rank's `x`."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def all_gather_columns(x: Float[Tensor, "R C"], group: str, size: int) -> Float[Tensor, "R sizeC"]:
    """Every rank's columns side by side, in the order of the ranks, of which there are `size`."""
    functional = torch.ops._c10d_functional
    stacked = functional.wait_tensor(functional.all_gather_into_tensor(x.contiguous(), size, group))
    return stacked.view(size, *x.shape).transpose(0, 1).reshape(x.shape[0], -1)


def broadcast(x: Int[Tensor, "*S"], group: str) -> Int[Tensor, "*S"]:
    """The first rank's `x`."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.broadcast(x, 0, group))
