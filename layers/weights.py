"""Weights of a model, from a checkpoint that is streamed into place or from random numbers."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dispec import ops
from dispec.layers.config import ModelConfig, Shard
from dispec.layers.rope import rope_frequencies
from dispec.layers.sharding import Part, Sharding
from dispec.layers.types import AttentionWeights, LayerWeights, MlpWeights, Weights
from dispec.layers.weight_specs import Source, WeightSpec, declare
from dispec.layers.weight_stacks import UNQUANTIZED, Packing, WeightStacks

log = logging.getLogger("dispec")


class WeightsError(ValueError):
    """A checkpoint's tensors do not match the model's declaration; the message names the tensor."""


def load_weights(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor | ops.QuantizedTensor]],
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[int], None] = lambda _: None,
    borrowed: Mapping[str, ops.Matrix] | None = None,
    shard: Shard | None = None,
    packing: Packing = UNQUANTIZED,
) -> Weights:
    """Stream a checkpoint's tensors into place, and pack each matrix once all its sources are copied.

    Peak memory is that of the weights and of one matrix that is not packed yet.

    tensors: (Hugging Face name, tensor) in any order.
    on_progress: is called with the number of elements of each tensor.
    borrowed: weights of another model, by their names in `Weights`, that are not among the tensors.
    shard: the rank that loads its part of the model `config`.
    Raises WeightsError for a tensor that is missing, unknown, repeated or of another shape.
    """
    sharding = Sharding(config, shard) if shard is not None else None
    spec_of = {
        source.name: spec for spec in declare(config) if spec.name not in (borrowed or {}) for source in spec.sources
    }
    stacks = WeightStacks(config.num_layers, dtype, device, packing)
    loading: dict[WeightSpec, _Loading] = {}
    num_dequantized = 0
    for name, tensor in tensors:
        spec = spec_of.get(name)
        if spec is None:
            raise WeightsError(f"tensor {name!r} of the checkpoint has no place in a {config.architecture}")
        if spec not in loading:
            loading[spec] = _Loading(spec, sharding, stacks)
        loading[spec].add(name, tensor)
        on_progress(tensor.numel())
        if not loading[spec].missing:
            stacks.add(spec, loading[spec].take())
            num_dequantized += loading[spec].is_dequantized
    if num_dequantized:
        log.info(
            "%d matrices are dequantised: their parts are not quantised or split over ranks alike", num_dequantized
        )
    absent = [name for name, spec in spec_of.items() if spec not in loading or name in loading[spec].missing]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise WeightsError(f"tensor {absent[0]!r}{more} is missing from the checkpoint")
    return assemble(config, {**stacks.weights(), **(borrowed or {})}, device, packing)


class _Loading:
    """A weight of which some sources may be missing: quantised if all sources are and fit together, else plain.

    missing: names of the sources that were not added yet. is_dequantized: whether quantised sources did not fit
        together in the weight that was taken, or not in the rank's part.
    """

    def __init__(self, spec: WeightSpec, sharding: Sharding | None, stacks: WeightStacks) -> None:
        self.missing = {source.name: source for source in spec.sources}
        self._spec, self._sharding, self._stacks = spec, sharding, stacks
        self.is_dequantized = False
        self._quantized: dict[str, ops.QuantizedTensor] = {}
        self._plain: Tensor | None = None

    def add(self, name: str, tensor: Tensor | ops.QuantizedTensor) -> None:
        """Add the rank's part of a source. Raises WeightsError if it was added before or has another shape."""
        if name not in self.missing:
            raise WeightsError(f"tensor {name!r} occurs twice in the checkpoint")
        source = self.missing.pop(name)
        if tuple(tensor.shape) != source.shape:
            raise WeightsError(
                f"tensor {name!r} has shape {list(tensor.shape)}, the config calls for {list(source.shape)}"
            )
        if isinstance(tensor, ops.QuantizedTensor) and self._spec.kind != "vector":
            part = source.part(self._sharding)
            if part.stop - part.start == part.size:
                self._quantized[name] = self._narrow(source, tensor, part).to(self._stacks.device)
                return
            self.is_dequantized = True
        self._copy(source, tensor)

    def take(self) -> Tensor | ops.QuantizedTensor:
        """Return the weight, once no source is missing."""
        if len(self._quantized) == len(self._spec.sources):
            parts = [self._quantized[source.name] for source in self._spec.sources]
            if (whole := ops.concatenate(parts)) is not None:
                self._quantized.clear()
                return whole
        self.is_dequantized |= bool(self._quantized)
        for name, tensor in self._quantized.items():
            (target,) = (view for source, view in self._views() if source.name == name)
            target.copy_(tensor.dequantize())
        self._quantized.clear()
        assert self._plain is not None
        plain, self._plain = self._plain, None
        return plain

    def _narrow(self, source: Source, tensor: ops.QuantizedTensor, part: Part) -> ops.QuantizedTensor:
        try:
            return tensor.narrow(source.dim, part.start, part.size)
        except ValueError as error:
            raise WeightsError(f"tensor {source.name!r} cannot be split over ranks: {error}") from None

    def _views(self) -> Iterator[tuple[Source, Tensor]]:
        if self._plain is None:
            self._plain = self._stacks.allocate(self._spec, self._spec.local_shape(self._sharding))
        return self._spec.views(self._plain, self._sharding)

    def _copy(self, source: Source, tensor: Tensor | ops.QuantizedTensor) -> None:
        (target,) = (view for one, view in self._views() if one is source)
        _copy_part(source, target, tensor if isinstance(tensor, Tensor) else tensor.dequantize(), self._sharding)


def _copy_part(source: Source, target: Tensor, tensor: Tensor, sharding: Sharding | None) -> None:
    """Copy a rank's part of a source, and zero the rest of the target.

    Of a memory-mapped file only the part's rows are read; of its columns, whole pages.
    """
    part = source.part(sharding)
    count = part.stop - part.start
    target.narrow(source.dim, 0, count).copy_(tensor.narrow(source.dim, part.start, count))
    target.narrow(source.dim, count, part.size - count).zero_()


def dummy_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    shard: Shard | None = None,
    packing: Packing = UNQUANTIZED,
) -> Weights:
    """Return random weights of the real shapes, scaled so that activations neither vanish nor explode.

    A rank's are its part of the whole model's, each of which is made for it in turn.
    """
    sharding = Sharding(config, shard) if shard is not None else None
    generator = torch.Generator(device).manual_seed(seed)
    stacks = WeightStacks(config.num_layers, dtype, device, packing)
    for spec in declare(config):
        # Nothing here refers to a weight while the next one is allocated.
        stacks.add(spec, _make_dummy(spec, stacks.allocate(spec, spec.local_shape(sharding)), sharding, generator))
    return assemble(config, stacks.weights(), device, packing)


def _make_dummy(spec: WeightSpec, weight: Tensor, sharding: Sharding | None, generator: torch.Generator) -> Tensor:
    """Fill a rank's weight, and return it."""
    if sharding is None:
        return _fill_dummy(spec, weight, generator)
    whole = _fill_dummy(spec, weight.new_empty(spec.shape), generator)
    for (source, target), (_, tensor) in zip(spec.views(weight, sharding), spec.views(whole, None), strict=True):
        _copy_part(source, target, tensor, sharding)
    return weight


def _fill_dummy(spec: WeightSpec, weight: Tensor, generator: torch.Generator) -> Tensor:
    if spec.kind == "vector":
        return weight.fill_(0.0 if spec.name.endswith("_bias") else 1.0)
    deviation = 1.0 if spec.kind == "table" else spec.shape[1] ** -0.5
    return weight.normal_(0.0, 0.5 * deviation, generator=generator)


def assemble(
    config: ModelConfig, weights: Mapping[str, Any], device: torch.device, packing: Packing = UNQUANTIZED
) -> Weights:
    """Return the `Weights` of weights by their declared names."""
    embedding, lm_head = weights["embedding"], weights.get("lm_head")
    if lm_head is None:  # tied
        lm_head = embedding if isinstance(embedding, ops.QuantizedWeight) else packing.pack(embedding, is_head=True)
        if not isinstance(lm_head, Tensor) and lm_head.has_readable_rows:
            embedding = lm_head

    def fields(prefix: str, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: weights.get(f"{prefix}.{name}") for name in names}

    return Weights(
        embedding=embedding,
        layers=LayerWeights(
            attention_norm=weights["layers.attention_norm"],
            attention=AttentionWeights(**fields("layers.attention", AttentionWeights._fields)),
            mlp_norm=weights["layers.mlp_norm"],
            mlp=MlpWeights(**fields("layers.mlp", MlpWeights._fields)),
        ),
        final_norm=weights["final_norm"],
        lm_head=lm_head,
        rope_frequencies=rope_frequencies(config).to(device),
    )
