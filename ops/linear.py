"""Matrix products with weights in the layout that the device reads fastest, and what a layer does around them.

On a CPU with AVX512-BF16 or AVX2, bf16 weights are packed once into the tiles of `ops.cpu.linear`; on others into
oneDNN's blocked layout. At one row a product then runs at the speed of memory, of which the plain layout reaches half.
Everywhere else a weight stays the plain [N, K] matrix. On CUDA in 16 bits a product with what a layer does around it is
one op: products of few rows have kernels of their own where those are faster (`ops.triton.linear`,
`ops.triton.few_rows`), and the compiler has little to do, which it does once for each layer.
"""

import os
from typing import NamedTuple, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from dispec.ops.cpu import linear as cpu_linear
from dispec.ops.cpu.library import has_packed_linear
from dispec.ops.norm import Norm, rms_norm

_library = torch.library.Library("dispec", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor weight, Tensor? bias, int features) -> Tensor")
_library.define(
    "tiled_linear(Tensor x, Tensor weight, int features, Tensor? bias, Tensor? norm, float eps, Tensor? residual,"
    " bool is_gated) -> Tensor"
)
_library.define("skinny_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("fused_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, float eps, bool is_gated) -> Tensor")
_library.define("linear_residual(Tensor(a!) total, Tensor x, Tensor weight, Tensor? bias) -> ()")

# The row count that the packed layout is chosen for. The layout oneDNN picks for 32 rows is also the best or
# near it for one row and for thousands.
_PACKED_FOR_ROWS = 32


class PackedWeight(NamedTuple):
    """A weight [features, K] whose elements are unreadable but for `linear`: in our tiles of bf16 (four dimensions) or
    of 8 bits (three), or in oneDNN's blocked layout (two).

    A type of its own, because under tracing the layout of the tensor inside is not to be seen. Tiles of several layers
    can be stacked in one more dimension; oneDNN's layout cannot.
    """

    blocked: Tensor
    out_features: int

    @property
    def has_readable_rows(self) -> bool:
        """Whether `embedding` can read its rows."""
        return self.blocked.dim() == 4


Matrix = Tensor | PackedWeight


def is_tiled(weight: Matrix) -> TypeGuard[PackedWeight]:
    """Whether a weight is in our tiles. A function: the compiler traces no checked property of a layer's weight."""
    return isinstance(weight, PackedWeight) and weight.blocked.dim() > 2


def pack(weight: Float[Tensor, "N K"], *, allow_int8: bool = False, out: Tensor | None = None) -> Matrix:
    """The weight in the layout that `linear` reads fastest on its device; the weight itself where that is it, or where
    `DISPEC_PACKED_WEIGHTS=off` asks for it, as measurements of what packing is worth do.

    allow_int8: to 8 bits, if that is faster. Products are then those of weights that are off by up to 1/254 of the
    largest in their row. out: memory for the tiles of a weight that has been found to be packed into tiles.
    """
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16:
        return weight
    if os.environ.get("DISPEC_PACKED_WEIGHTS", "on") == "off":
        return weight
    if has_packed_linear():
        return PackedWeight((cpu_linear.pack_8_bits if allow_int8 else cpu_linear.pack)(weight, out), weight.shape[0])
    if not _packs_bfloat16():
        return weight
    return PackedWeight(torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS), weight.shape[0])


def linear(
    x: Float[Tensor, "T K"],
    weight: Matrix,
    bias: Float[Tensor, "N"] | None = None,
    *,
    norm: Norm | None = None,
    residual: Float[Tensor, "T M"] | None = None,
    is_gated: bool = False,
) -> Float[Tensor, "T M"]:
    """`norm(x) @ weight.T + bias + residual` for a weight [N, K] that `pack` returned; M is N.

    If `is_gated`, the first half of the N features gates the second before `residual` is added, `silu(gate) * up`
    (arXiv:2002.05202), and M is N / 2. Products are summed in float32 and rounded once to x's dtype; what is asked for
    around them is computed as if it were an operation of its own, and costs no pass of its own where a kernel has it.
    """
    if isinstance(weight, Tensor) and is_fused(x):
        return _fused(x, weight, bias, norm, residual, is_gated)
    if is_tiled(weight) and not (is_gated and weight.out_features % (2 * cpu_linear.TILE)):
        added = None if is_gated else residual
        y = torch.ops.dispec.tiled_linear(x, *weight, bias, *(norm or (None, 0.0)), added, is_gated)
        return y if added is residual else residual + y
    y = _product(x if norm is None else rms_norm(x, norm), weight, bias)
    if is_gated:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    return y if residual is None else residual + y


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, residual: Tensor | None, is_gated: bool
) -> Tensor:
    if residual is not None and norm is None and not is_gated:
        # In place, torch's product adds in its own kernel. The compiler drops the copy of a residual that is not read
        # again, which is every layer's.
        total = residual.clone(memory_format=torch.contiguous_format)
        torch.ops.dispec.linear_residual(total, x, weight, bias)
        return total
    if norm is None and not is_gated:
        return torch.ops.dispec.skinny_linear(x, weight, bias)
    norm_weight, eps = norm or (None, 0.0)
    y = torch.ops.dispec.fused_linear(x, weight, bias, norm_weight, eps, is_gated)
    return y if residual is None else residual + y


def is_fused(x: Tensor) -> bool:
    """Whether a product and what is around it are one op, which chooses kernels by the number of rows."""
    return x.is_cuda and x.dtype.itemsize == 2


def allocate_workspaces(device: torch.device) -> None:
    """Allocate what ops keep on a device between calls. Must be called before a step is compiled or recorded there."""
    if device.type == "cuda":
        from dispec.ops.triton.add_product import arrivals

        arrivals(torch.empty(0, device=device).device)  # with an index, as the tensors of a call have it


def _product(x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    if is_tiled(weight):
        return torch.ops.dispec.tiled_linear(x, weight.blocked, weight.out_features, bias, None, 0.0, None, False)
    if isinstance(weight, PackedWeight):
        return torch.ops.dispec.packed_linear(x, weight.blocked, bias, weight.out_features)
    return torch.nn.functional.linear(x, weight, bias)


def _packs_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, features: int) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _packed_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, features: int) -> Tensor:
    return x.new_empty(x.shape[0], features)


def _tiled_linear_fake(
    x: Tensor,
    weight: Tensor,
    features: int,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    is_gated: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], features // 2 if is_gated else features)


def _few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from dispec.ops.triton.few_rows import linear as kernel

    return kernel(x, weight, bias)


def _few_rows_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    is_gated: bool,
) -> Tensor:
    from dispec.ops.triton.linear import fused_linear as kernels

    return kernels(x, weight, bias, None if norm is None else Norm(norm, eps), is_gated)


def _fused_linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, is_gated: bool
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if is_gated else weight.shape[0])


def _add_linear(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    from dispec.ops.triton.linear import linear_residual as kernels

    kernels(total, x, weight, bias)


_library.impl("packed_linear", _packed_linear, "CPU")
_library.impl("linear_residual", _add_linear, "CUDA")
torch.library.register_fake("dispec::linear_residual", lambda *_: None, lib=_library)
_library.impl("fused_linear", _fused_linear, "CUDA")
torch.library.register_fake("dispec::fused_linear", _fused_linear_fake, lib=_library)
_library.impl("skinny_linear", _few_rows_linear, "CUDA")
torch.library.register_fake("dispec::skinny_linear", _few_rows_linear_fake, lib=_library)
_library.impl("packed_linear", _packed_linear, "MkldnnCPU")
_library.impl("tiled_linear", cpu_linear.linear, "CPU")
torch.library.register_fake("dispec::packed_linear", _packed_linear_fake, lib=_library)
torch.library.register_fake("dispec::tiled_linear", _tiled_linear_fake, lib=_library)
