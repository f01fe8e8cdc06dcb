"""Matrices of all layers as one, in any layout: its tensors get the layers as their first dimension."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from dispec.ops.huge_pages import on_huge_pages
from dispec.ops.linear import Matrix, PackedWeight


def empty_stack(weight: Matrix, num_layers: int) -> Matrix | None:
    """Return uninitialised memory for the weights of all layers, of which `weight` is one.

    None: layers in oneDNN's layout cannot be stacked.
    """
    if isinstance(weight, PackedWeight) and weight.blocked.is_mkldnn:
        return None
    return _map(weight, lambda part: on_huge_pages(part.new_empty((num_layers, *part.shape))))


def layer_of(stack: Matrix, layer: int) -> Matrix:
    """Return the weight of one layer of a stack, as a view."""
    return _map(stack, lambda part: part[layer])


def clone(weight: Matrix) -> Matrix:
    """Return a copy."""
    return _map(weight, torch.clone)


def copy_layer(source: Matrix, target: Matrix) -> None:
    """Copy a weight to one of the same layout."""
    for mine, other in zip(_parts(target), _parts(source), strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(other)


def is_alike(one: Matrix, other: Matrix) -> bool:
    """Return whether two weights have the same layout and shape."""

    def layout(weight: Matrix) -> list[Any]:
        return [(part.shape, part.dtype) if isinstance(part, Tensor) else part for part in _parts(weight)]

    return type(one) is type(other) and layout(one) == layout(other)


def _parts(weight: Matrix) -> tuple[Any, ...]:
    return (weight,) if isinstance(weight, Tensor) else weight


def _map(weight: Matrix, function: Callable[[Tensor], Tensor]) -> Matrix:
    if isinstance(weight, Tensor):
        return function(weight)
    parts = [function(part) if isinstance(part, Tensor) else part for part in weight]
    return cast(Matrix, type(weight)(*cast(Any, parts)))
