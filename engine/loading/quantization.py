"""Which weights of a model are quantised, by options, checkpoint and device."""

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dispec.engine.dtypes import DTYPES
from dispec.engine.loading.checkpoint import Checkpoint
from dispec.engine.options import EngineOptions
from dispec.layers.types import Weights
from dispec.layers.weight_stacks import Packing
from dispec.ops import Kind, Quantization, QuantizedTensor, QuantizedWeight, has_quantized_kernel

log = logging.getLogger("dispec")


def packing_for(options: EngineOptions, device: torch.device) -> Packing:
    """Return how a model's plain matrices are quantised while they are loaded.

    Raises ValueError if the device or the dtype has no kernel for `options.quantization`.
    """
    if options.quantization not in ("int4", "int8", "fp8"):
        return Packing()
    kind: Kind = options.quantization
    if not has_quantized_kernel(kind, device, DTYPES[options.dtype]):
        raise ValueError(
            f"quantization is {kind!r}, which has no kernel for {options.dtype} on this {device.type.upper()} device"
        )
    return Packing(Quantization(kind, _group_size(options) if kind == "int4" else None))


def _group_size(options: EngineOptions) -> int:
    return options.quantization_group_size or 32


def draft_packing(device: torch.device, dtype: torch.dtype) -> Packing:
    """Return how the matrices of a draft model are quantised: to int8 on a CPU, where that halves the time of a step.

    Rounding only lowers the acceptance rate.
    """
    if device.type == "cpu" and has_quantized_kernel("int8", device, dtype):
        return Packing(Quantization("int8"))
    return Packing()


def with_kernels(
    tensors: Iterable[tuple[str, Tensor | QuantizedTensor]], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """Yield a checkpoint's tensors, those dequantised that have no kernel. One log line names each such kind."""
    dequantized: set[Kind] = set()
    for name, tensor in tensors:
        if isinstance(tensor, QuantizedTensor) and not has_quantized_kernel(tensor.kind, device, dtype):
            if tensor.kind not in dequantized:
                dequantized.add(tensor.kind)
                log.info("%s weights are dequantised: there is no kernel for %s on %s", tensor.kind, dtype, device.type)
            yield name, tensor.dequantize(dtype)
        else:
            yield name, tensor


def weights_format(weights: Weights, options: EngineOptions, checkpoint: Checkpoint | None) -> str:
    """Return the format of loaded weights in words, and that of the files if it is another one.

    Such as "bfloat16", "GGUF Q4_0", "bfloat16, dequantised from GGUF Q4_1 and Q8_0" and "int8, rounded while loading".
    """
    is_dummy = options.load_format == "dummy"
    stored = None if checkpoint is None or is_dummy else checkpoint.quantized_format
    leaves = torch.utils._pytree.tree_leaves(weights, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))
    if not any(isinstance(leaf, QuantizedWeight) for leaf in leaves):
        return options.dtype if stored is None else f"{options.dtype}, dequantised from {stored}"
    if options.quantization not in ("int4", "int8", "fp8"):
        return stored or "quantised"
    kind = f"int4 in groups of {_group_size(options)}" if options.quantization == "int4" else options.quantization
    return kind if is_dummy else f"{kind}, rounded {'while loading' if stored is None else f'from {stored}'}"
