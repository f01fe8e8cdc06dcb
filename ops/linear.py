"""Linear layers with weights in the layout that the device reads fastest, with the norm, gate or residual around them.

On a CPU with AVX512-BF16 or AVX2, bf16 weights are packed once into the tiles of `ops.cpu.linear`, on other CPUs into
oneDNN's blocked layout: one token then takes the time of reading the weight, where the plain layout takes twice that.
On other devices a weight stays the plain [N, K] matrix. On CUDA in 16 bits a linear layer with its norm, gate or
residual is one op: for few tokens it runs in one kernel where that is faster (`ops.triton.linear`,
`ops.triton.skinny_linear`).
"""

import os
from typing import Any, NamedTuple, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from dispec.ops.cpu import linear as cpu_linear
from dispec.ops.cpu.library import has_packed_linear
from dispec.ops.norm import Norm, rms_norm
from dispec.ops.quantization import Quantization, QuantizedTensor, quantize
from dispec.ops.quantized_linear import QuantizedWeight, pack_quantized, quantized_linear
from dispec.ops.registration import register, returns_nothing

# Tokens that oneDNN chooses its layout for. The layout for 32 is also the best or nearly the best for 1 and for
# thousands.
_ONEDNN_TOKENS = 32


class PackedWeight(NamedTuple):
    """A weight [out_features, K] in a layout for `linear`: tiles of bf16 (4 dimensions) or oneDNN's (2).

    It is a type of its own because tracing does not see the layout of a tensor. Tiles of several layers can be stacked
    in one more dimension; oneDNN's layout cannot.
    """

    blocked: Tensor
    out_features: int

    @property
    def has_readable_rows(self) -> bool:
        """Whether `embedding` takes the weight: only tiles."""
        return self.blocked.dim() == 4


Matrix = Tensor | PackedWeight | QuantizedWeight


def is_tiled(weight: Matrix) -> TypeGuard[PackedWeight]:
    """Return whether a weight is in tiles. A function, because the compiler traces no checked property of a weight."""
    return isinstance(weight, PackedWeight) and weight.blocked.dim() > 2


def pack(
    weight: Float[Tensor, "N K"] | QuantizedTensor,
    quantization: Quantization | None = None,
    *,
    out: Tensor | None = None,
) -> Matrix:
    """Return the weight in the layout that `linear` reads fastest on its device, which may be the weight itself.

    quantization: to round a plain weight to; `has_quantized_kernel` must hold. out: memory for the tiles, where
    weights like this one are packed into tiles of bf16. `DISPEC_PACKED_WEIGHTS=off` keeps weights plain, to measure
    what packing gains.
    """
    if isinstance(weight, QuantizedTensor):
        return pack_quantized(weight)
    if quantization is not None:
        return pack_quantized(quantize(weight, quantization))
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16:
        return weight
    if os.environ.get("DISPEC_PACKED_WEIGHTS", "on") == "off":
        return weight
    if has_packed_linear():
        return PackedWeight(cpu_linear.pack(weight, out), weight.shape[0])
    if not _packs_bfloat16():
        return weight
    return PackedWeight(torch.ops.mkldnn._reorder_linear_weight(weight, _ONEDNN_TOKENS), weight.shape[0])


def linear(
    x: Float[Tensor, "T K"],
    weight: Matrix,
    bias: Float[Tensor, "N"] | None = None,
    *,
    norm: Norm | None = None,
    residual: Float[Tensor, "T M"] | None = None,
    is_gated: bool = False,
) -> Float[Tensor, "T M"]:
    """Return `norm(x) @ weight.T + bias + residual` for a weight [N, K] that `pack` returned; M is N.

    If `is_gated`, the first half of the N features gates the second, `silu(gate) * up` (arXiv:2002.05202), before
    `residual` is added, and M is N / 2. Products are summed in float32 and rounded once to x's dtype. Norm, gate and
    residual give the results of separate operations; kernels that fuse them need no pass of their own for them.
    """
    if isinstance(weight, Tensor) and is_fused(x):
        return _fused(x, weight, bias, norm, residual, is_gated)
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, bias, norm, residual, is_gated)
    if is_tiled(weight) and not (is_gated and weight.out_features % (2 * cpu_linear.TILE)):
        added = None if is_gated else residual
        y = torch.ops.dispec.tiled_linear(x, *weight, bias, *(norm or (None, 0.0)), added, is_gated)
        return y if added is residual else residual + y
    y = _linear(x if norm is None else rms_norm(x, norm), weight, bias)
    if is_gated:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    return y if residual is None else residual + y


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, residual: Tensor | None, is_gated: bool
) -> Tensor:
    if residual is not None and norm is None and not is_gated:
        # In place, because torch's GEMM adds in its own kernel. The compiler drops the copy of a residual that is not
        # read again, as in every layer.
        residual = residual.clone(memory_format=torch.contiguous_format)
        torch.ops.dispec.linear_residual(residual, x, weight, bias)
        return residual
    y = torch.ops.dispec.fused_linear(x, weight, bias, *(norm or (None, 0.0)), is_gated)
    return y if residual is None else residual + y


def is_fused(x: Tensor) -> bool:
    """Return whether a linear layer and its norm, gate or residual are one op, which chooses kernels by token count."""
    return x.is_cuda and x.dtype.itemsize == 2


def allocate_workspaces(device: torch.device) -> None:
    """Allocate the buffers that ops keep on a device; must precede the first compilation and recording there."""
    if device.type == "cuda":
        from dispec.ops.triton.linear_residual import split_counters

        split_counters(torch.empty(0, device=device).device)  # with an index, as the tensors of a call have it


def _linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
    if is_tiled(weight):
        return torch.ops.dispec.tiled_linear(x, weight.blocked, weight.out_features, bias, None, 0.0, None, False)
    if isinstance(weight, PackedWeight):
        return torch.ops.dispec.packed_linear(x, weight.blocked, bias, weight.out_features)
    return torch.nn.functional.linear(x, weight, bias)


def _packs_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _fused_linear(*given: Any) -> Tensor:
    from dispec.ops.triton.linear import fused_linear as kernels

    return kernels(*given)


def _linear_residual(*given: Any) -> None:
    from dispec.ops.triton.linear import linear_residual as kernels

    kernels(*given)


def _fused_linear_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    is_gated = rest[-1]
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if is_gated else weight.shape[0])


def _tiled_linear_fake(x: Tensor, weight: Tensor, out_features: int, *rest: Any) -> Tensor:
    is_gated = rest[-1]
    return x.new_empty(x.shape[0], out_features // 2 if is_gated else out_features)


register(
    "packed_linear(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor",
    lambda x, weight, bias, out_features: x.new_empty(x.shape[0], out_features),
    cpu=_packed_linear,
    mkldnn=_packed_linear,
)
register(
    "tiled_linear(Tensor x, Tensor weight, int out_features, Tensor? bias, Tensor? norm, float eps, Tensor? residual,"
    " bool is_gated) -> Tensor",
    _tiled_linear_fake,
    cpu=cpu_linear.linear,
)
register(
    "fused_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, float eps, bool is_gated) -> Tensor",
    _fused_linear_fake,
    cuda=_fused_linear,
)
register(
    "linear_residual(Tensor(a!) residual, Tensor x, Tensor weight, Tensor? bias) -> ()",
    returns_nothing,
    cuda=_linear_residual,
)
