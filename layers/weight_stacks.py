"""The weights of all layers as one tensor each, while they come in one by one, and how matrices are packed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dispec import ops
from dispec.layers.weight_specs import WeightSpec

Stack = ops.Matrix | tuple[ops.Matrix, ...]


@dataclass(frozen=True)
class Packing:
    """How plain matrices are quantised while they are loaded; None keeps them.

    The head has at least 8 bits. keeps_plain: leave all matrices plain tensors.
    """

    quantization: ops.Quantization | None = None
    keeps_plain: bool = False

    def pack(self, matrix: Tensor | ops.QuantizedTensor, *, is_head: bool = False, out: Tensor | None = None) -> Any:
        """Return a matrix in the layout of `ops.pack`."""
        if self.keeps_plain and isinstance(matrix, Tensor):
            return matrix
        quantization = self.quantization
        if is_head and quantization is not None and quantization.kind == "int4":
            quantization = ops.Quantization("int8")
        return ops.pack(matrix, quantization, out=out)


UNQUANTIZED = Packing()


class WeightStacks:
    """Weights by their names in `Weights`, those of the layers stacked."""

    def __init__(self, num_layers: int, dtype: torch.dtype, device: torch.device, packing: Packing) -> None:
        self.device = device
        self._num_layers = num_layers
        self._packing = packing
        self._like = torch.empty(2, 2, dtype=dtype, device=device)
        self._packs = not isinstance(packing.pack(self._like), Tensor)
        self._weights: dict[str, Any] = {}
        # Layers of matrices whose layouts differ between layers or cannot be stacked.
        self._unstacked: dict[str, dict[int, ops.Matrix]] = {}
        self._stacked: dict[str, set[int]] = {}

    def allocate(self, spec: WeightSpec, shape: tuple[int, ...]) -> Tensor:
        """Return uninitialised memory for a weight: its place in the stack, unless it is packed afterwards."""
        if spec.layer is None or (self._packs and spec.kind == "matrix") or spec.name in self._unstacked:
            return self._like.new_empty(shape)
        if not isinstance(self._weights.get(spec.name, self._like), Tensor):
            return self._like.new_empty(shape)
        if spec.name not in self._weights:
            self._weights[spec.name] = ops.on_huge_pages(self._like.new_empty((self._num_layers, *shape)))
        return self._weights[spec.name][spec.layer]

    def add(self, spec: WeightSpec, weight: Tensor | ops.QuantizedTensor) -> None:
        """Add a weight, once its values are complete."""
        if spec.layer is None:
            is_packed = isinstance(weight, ops.QuantizedTensor) or spec.kind == "matrix"
            self._weights[spec.name] = self._packing.pack(weight, is_head=True) if is_packed else weight
        elif isinstance(weight, ops.QuantizedTensor) or (self._packs and spec.kind == "matrix"):
            self._add_layer(spec.name, spec.layer, weight)
        elif not self._is_in_stack(spec, weight):
            self._add_unstacked(spec.name, spec.layer, weight)
        else:
            self._stacked.setdefault(spec.name, set()).add(spec.layer)

    def _is_in_stack(self, spec: WeightSpec, weight: Tensor) -> bool:
        stack = self._weights.get(spec.name)
        return isinstance(stack, Tensor) and stack[spec.layer].data_ptr() == weight.data_ptr()

    def _add_layer(self, name: str, layer: int, matrix: Tensor | ops.QuantizedTensor) -> None:
        stack = self._weights.get(name)
        if isinstance(stack, ops.PackedWeight) and isinstance(matrix, Tensor):
            self._packing.pack(matrix, out=stack.blocked[layer])
            self._stacked[name].add(layer)
            return
        packed = self._packing.pack(matrix)
        if stack is None and name not in self._unstacked:
            stack = ops.empty_stack(packed, self._num_layers)
            if stack is not None:
                self._weights[name] = stack
        if stack is None or not ops.is_alike(ops.layer_of(stack, layer), packed):
            self._add_unstacked(name, layer, packed)
            return
        ops.copy_layer(packed, ops.layer_of(stack, layer))
        self._stacked.setdefault(name, set()).add(layer)

    def _add_unstacked(self, name: str, layer: int, matrix: ops.Matrix) -> None:
        """Add a layer that does not fit in the stack, which is dissolved."""
        layers = self._unstacked.setdefault(name, {})
        if (stack := self._weights.pop(name, None)) is not None:
            for other in self._stacked.pop(name, set()):
                layers[other] = ops.clone(ops.layer_of(stack, other))
        layers[layer] = matrix

    def weights(self) -> dict[str, Stack]:
        """Return all weights, once all were added."""
        layers = range(self._num_layers)
        return self._weights | {
            name: tuple(packed[layer] for layer in layers) for name, packed in self._unstacked.items()
        }
