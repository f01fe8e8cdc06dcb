"""Linear layers with quantised weights: a `QuantizedTensor` in the layout that the kernels of its device read."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec.ops.cpu import quantized_linear as cpu_quantized_linear
from dispec.ops.cpu.library import has_packed_linear
from dispec.ops.norm import Norm, rms_norm
from dispec.ops.quantization import Kind, QuantizedTensor
from dispec.ops.registration import register


class QuantizedWeight(NamedTuple):
    """A weight [out_features, K] for `quantized_linear`; `read_rows` reads its rows. Layers can be stacked in one more
    dimension of each tensor.

    data: the codes, on a CPU with their scales and offsets.
    scales, offsets: those that are not in `data`; offsets None where all are 0.
    column_order, kind, group_size: as in `QuantizedTensor`.
    """

    data: Tensor
    scales: Tensor | None
    offsets: Tensor | None
    column_order: Int[Tensor, "K"] | None
    out_features: int
    kind: Kind
    group_size: int
    has_offsets: bool

    @property
    def has_readable_rows(self) -> bool:
        """Whether `embedding` takes the weight."""
        return self.column_order is None


def has_quantized_kernel(kind: Kind, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `quantized_linear` has a kernel for a kind of weight and inputs of a dtype on a device."""
    if kind == "fp8":
        return dtype is torch.bfloat16 and device.type == "cuda" and _has_e4m3(device)
    if device.type == "cpu":
        return dtype is torch.bfloat16 and has_packed_linear()
    return dtype is torch.bfloat16 or (dtype is torch.float16 and device.type == "cuda")


def _has_e4m3(device: torch.device) -> bool:
    """Return whether a CUDA device converts from and to e4m3 and multiplies it: Ada and Hopper, not Ampere."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 9)


def pack_quantized(weight: QuantizedTensor) -> QuantizedWeight:
    """Return the weight in the layout of its device, where `has_quantized_kernel` holds.

    Raises ValueError if rows of e4m3 have several scales.
    """
    if weight.kind == "fp8" and weight.scales.shape[1] != 1:
        raise ValueError(f"fp8 weights have one scale for each row, not one for every {weight.group_size} columns")
    column_order = None if weight.column_order is None else weight.column_order.int()
    group_size = min(weight.group_size, weight.shape[1])
    layout = (column_order, weight.shape[0], weight.kind, group_size, weight.offsets is not None)
    data, scales, offsets = weight.codes, weight.scales, weight.offsets
    if weight.kind == "fp8":
        return QuantizedWeight(data, scales, offsets, *layout)
    if not data.is_cuda:
        packed = cpu_quantized_linear.pack(weight.kind, data, scales, offsets, group_size)
        return QuantizedWeight(packed, None, None, *layout)
    from dispec.ops.triton.quantized_layout import pack_codes, pack_scales

    return QuantizedWeight(
        pack_codes(data, weight.kind, weight.group_size),
        pack_scales(scales),
        None if offsets is None else pack_scales(offsets),
        *layout,
    )


def quantized_linear(
    x: Float[Tensor, "T K"],
    weight: QuantizedWeight,
    bias: Float[Tensor, "N"] | None,
    norm: Norm | None,
    residual: Float[Tensor, "T M"] | None,
    is_gated: bool,
) -> Float[Tensor, "T M"]:
    """Compute `ops.linear`. Products are summed in float32 and rounded once; int4 and int8 weights are exact.

    In fp8 each row of x is rounded to e4m3 first, with a scale of its own.
    """
    if weight.column_order is not None:
        x = (x if norm is None else rms_norm(x, norm)).index_select(1, weight.column_order)
        norm = None
    data, scales, offsets, _, *layout = weight
    return torch.ops.dispec.quantized_linear(
        x, data, scales, offsets, *layout, bias, *(norm or (None, 0.0)), residual, is_gated
    )


def read_rows(weight: QuantizedWeight, indices: Int[Tensor, "T"], in_features: int) -> Float[Tensor, "T K"]:
    """Return rows of a weight with `has_readable_rows`, in bfloat16."""
    data, scales, offsets, _, _, *layout = weight
    return torch.ops.dispec.read_quantized_rows(data, scales, offsets, indices, in_features, *layout)


def _quantized_linear_cuda(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    out_features: int,
    kind: str,
    group_size: int,
    has_offsets: bool,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    is_gated: bool,
) -> Tensor:
    from dispec.ops.triton.fp8_linear import fp8_linear
    from dispec.ops.triton.quantized_linear import quantized_linear as integer_linear

    rest = (bias, None if norm is None else Norm(norm, eps), residual, is_gated)
    if kind == "fp8":
        return fp8_linear(x, data, scales, *rest)
    return integer_linear(x, data, scales, offsets, out_features, kind, group_size, *rest)


def _read_rows(
    data: Tensor,
    scales: Tensor | None,
    offsets: Tensor | None,
    indices: Tensor,
    in_features: int,
    kind: str,
    group_size: int,
    has_offsets: bool,
) -> Tensor:
    if scales is None:
        return cpu_quantized_linear.read_rows(data, indices, in_features, kind, group_size, has_offsets)
    if kind == "fp8":
        codes = data.view(torch.int8)[indices].view(data.dtype)  # torch indexes no e4m3 on some devices
        return (codes.float() * scales[indices]).bfloat16()
    from dispec.ops.triton.quantized_layout import read_rows as read

    return read(data, scales, offsets, indices, in_features, kind, group_size).bfloat16()


register(
    "quantized_linear(Tensor x, Tensor data, Tensor? scales, Tensor? offsets, int out_features, str kind,"
    " int group_size, bool has_offsets, Tensor? bias, Tensor? norm, float eps, Tensor? residual, bool is_gated)"
    " -> Tensor",
    lambda x, data, scales, offsets, out_features, *rest: x.new_empty(
        x.shape[0], out_features // 2 if rest[-1] else out_features
    ),
    cpu=cpu_quantized_linear.linear,
    cuda=_quantized_linear_cuda,
)
register(
    "read_quantized_rows(Tensor data, Tensor? scales, Tensor? offsets, Tensor indices, int in_features, str kind,"
    " int group_size, bool has_offsets) -> Tensor",
    lambda data, scales, offsets, indices, in_features, *_: data.new_empty(
        indices.shape[0], in_features, dtype=torch.bfloat16
    ),
    cpu=_read_rows,
    cuda=_read_rows,
)
