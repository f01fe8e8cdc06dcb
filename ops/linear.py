"""Matrix products with weights in the layout that the device reads fastest.

On a CPU with AVX512-BF16, bf16 weights are packed once into the tiles of `ops.cpu.linear`; on others into oneDNN's
blocked layout. At one row a product then runs at the speed of memory, where the plain layout reaches half of it.
Everywhere else a weight stays the plain [N, K] matrix; on CUDA products of few rows in 16 bits, which are decode steps,
have kernels of their own where those are faster (`ops.triton.few_rows`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ops.cpu import linear as cpu_linear
from ops.cpu.library import has_linear

_library = torch.library.Library("dispec", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor weight, Tensor? bias, int features) -> Tensor")
_library.define("tiled_linear(Tensor x, Tensor weight, Tensor? bias, int features) -> Tensor")
_library.define("few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")

# The row count that the packed layout is chosen for. The layout oneDNN picks for 32 rows is also the best or
# near it for one row and for thousands.
_PACKED_FOR_ROWS = 32


class Packed(NamedTuple):
    """A weight [features, K] whose elements are unreadable but for `linear`: in our tiles (four dimensions), or in
    oneDNN's blocked layout (two).

    A type of its own, because under tracing the layout of the tensor inside is not to be seen.
    """

    blocked: Tensor
    features: int

    @property
    def is_tiled(self) -> bool:
        return self.blocked.dim() == 4


Matrix = Tensor | Packed


def pack(weight: Float[Tensor, "N K"]) -> Matrix:
    """The weight in the layout that `linear` reads fastest on its device; the weight itself where that is it."""
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16:
        return weight
    if has_linear():
        return Packed(cpu_linear.pack(weight), weight.shape[0])
    if not _packs_bfloat16():
        return weight
    return Packed(torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS), weight.shape[0])


def linear(x: Float[Tensor, "T K"], weight: Matrix, bias: Float[Tensor, "N"] | None = None) -> Float[Tensor, "T N"]:
    """`x @ weight.T + bias` for a weight [N, K] that `pack` returned. Sums in float32, rounds once to x's dtype."""
    if isinstance(weight, Packed) and weight.is_tiled:
        return torch.ops.dispec.tiled_linear(x, weight.blocked, bias, weight.features)
    if isinstance(weight, Packed):
        return torch.ops.dispec.packed_linear(x, weight.blocked, bias, weight.features)
    if x.is_cuda and x.dtype.itemsize == 2:
        return torch.ops.dispec.few_rows_linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def _packs_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, features: int) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _packed_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, features: int) -> Tensor:
    return x.new_empty(x.shape[0], features)


def _few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from ops.triton.few_rows import linear as kernel

    return kernel(x, weight, bias)


def _few_rows_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_library.impl("packed_linear", _packed_linear, "CPU")
_library.impl("few_rows_linear", _few_rows_linear, "CUDA")
torch.library.register_fake("dispec::few_rows_linear", _few_rows_linear_fake, lib=_library)
_library.impl("packed_linear", _packed_linear, "MkldnnCPU")
_library.impl("tiled_linear", cpu_linear.linear, "CPU")
for _name in ("packed_linear", "tiled_linear"):
    torch.library.register_fake(f"dispec::{_name}", _packed_linear_fake, lib=_library)
