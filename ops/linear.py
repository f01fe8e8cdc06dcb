"""Matrix products with weights in the layout that the device reads fastest.

On CPU, bf16 weights are packed once into oneDNN's blocked layout: at one row a product then streams its weight
at 20 to 30 GB/s where the plain layout reaches 16, and matrix-matrix products get faster as well. Everywhere
else a weight stays the plain [N, K] matrix and the compiler may fuse around the product.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_library = torch.library.Library("dispec", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor weight, Tensor? bias, int features) -> Tensor")

# The row count that the packed layout is chosen for. The layout oneDNN picks for 32 rows is also the best or
# near it for one row and for thousands.
_PACKED_FOR_ROWS = 32


class Packed(NamedTuple):
    """A weight [features, K] in oneDNN's blocked layout. Its elements are unreadable but for `linear`.

    A type of its own, because under tracing the layout of the tensor inside is not to be seen.
    """

    blocked: Tensor
    features: int


Matrix = Tensor | Packed


def pack(weight: Float[Tensor, "N K"]) -> Matrix:
    """The weight in the layout that `linear` reads fastest on its device; the weight itself where that is it."""
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16 or not _packs_bfloat16():
        return weight
    return Packed(torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS), weight.shape[0])


def linear(x: Float[Tensor, "T K"], weight: Matrix, bias: Float[Tensor, "N"] | None = None) -> Float[Tensor, "T N"]:
    """`x @ weight.T + bias` for a weight [N, K] that `pack` returned. Sums in float32, rounds once to x's dtype."""
    if isinstance(weight, Packed):
        return torch.ops.dispec.packed_linear(x, weight.blocked, bias, weight.features)
    return torch.nn.functional.linear(x, weight, bias)


def _packs_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, features: int) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _packed_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, features: int) -> Tensor:
    return x.new_empty(x.shape[0], features)


_library.impl("packed_linear", _packed_linear, "CPU")
_library.impl("packed_linear", _packed_linear, "MkldnnCPU")
torch.library.register_fake("dispec::packed_linear", _packed_linear_fake, lib=_library)
