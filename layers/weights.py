"""Every weight of a model, declared once: its place in `Weights`, its shape, and its names in a checkpoint.

Loading, dummy weights and tests derive from `declare`. The weights of all layers are stacked in one tensor each; a
checkpoint is streamed into its slices.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dispec import ops
from dispec.layers.config import ModelConfig, Shard
from dispec.layers.rope import rope_frequencies
from dispec.layers.sharding import Axis, Part, Sharding
from dispec.layers.types import AttentionWeights, LayerWeights, MlpWeights, Weights

log = logging.getLogger("dispec")

Stack = ops.Matrix | tuple[ops.Matrix, ...]


class WeightsError(ValueError):
    """A checkpoint's tensors do not match the model's declaration; the message names the tensor."""


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


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, by its Hugging Face name, that fills some rows of a weight.

    splits: what dimension `dim` counts, if it is split over ranks.
    """

    name: str
    shape: tuple[int, ...]
    splits: Axis | None = None
    dim: int = 0

    def part(self, sharding: Sharding | None) -> Part:
        """Return the rank's part of dimension `dim`."""
        whole = self.shape[self.dim]
        return Part(0, whole, whole) if sharding is None else sharding.part(self.splits, whole)

    def local_shape(self, sharding: Sharding | None) -> tuple[int, ...]:
        """Return the shape of the rank's part."""
        return (*self.shape[: self.dim], self.part(sharding).size, *self.shape[self.dim + 1 :])


@dataclass(frozen=True)
class WeightSpec:
    """One weight: its sources, stacked along the first dimension.

    name: its path in `Weights`. layer: its place in the stack there, None for a weight outside of the layers.
    kind: a `matrix` is multiplied by and may be packed, a `table` is looked up by row, a `vector` is used elementwise.
    """

    name: str
    kind: Literal["matrix", "table", "vector"]
    sources: tuple[Source, ...]
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.local_shape(None)

    def local_shape(self, sharding: Sharding | None) -> tuple[int, ...]:
        """Return the shape of the rank's part."""
        shapes = [source.local_shape(sharding) for source in self.sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def views(self, weight: Tensor, sharding: Sharding | None) -> Iterator[tuple[Source, Tensor]]:
        """Yield each source with its rows of the rank's weight."""
        rows = [source.local_shape(sharding)[0] for source in self.sources]
        yield from zip(self.sources, weight.split(rows), strict=True)


def declare(config: ModelConfig) -> Iterator[WeightSpec]:
    """Yield all weights of a model, in the order of the forward pass."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield WeightSpec("embedding", "table", (Source("model.embed_tokens.weight", (vocab, hidden), "vocabulary"),))
    for layer in range(config.num_layers):
        for spec in _declare_layer(config, f"model.layers.{layer}"):
            yield replace(spec, layer=layer)
    yield WeightSpec("final_norm", "vector", (Source("model.norm.weight", (hidden,)),))
    if not config.tie_embeddings:
        yield WeightSpec("lm_head", "matrix", (Source("lm_head.weight", (vocab, hidden), "vocabulary"),))


def _declare_layer(config: ModelConfig, prefix: str) -> Iterator[WeightSpec]:
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    projections: tuple[tuple[str, int, Axis], ...] = (
        ("q_proj", query_rows, "query_heads"),
        ("k_proj", kv_rows, "kv_heads"),
        ("v_proj", kv_rows, "kv_heads"),
    )
    attention = f"{prefix}.self_attn"
    yield WeightSpec("layers.attention_norm", "vector", (Source(f"{prefix}.input_layernorm.weight", (hidden,)),))
    yield WeightSpec(
        "layers.attention.qkv",
        "matrix",
        tuple(Source(f"{attention}.{name}.weight", (rows, hidden), heads) for name, rows, heads in projections),
    )
    if config.qkv_bias:
        yield WeightSpec(
            "layers.attention.qkv_bias",
            "vector",
            tuple(Source(f"{attention}.{name}.bias", (rows,), heads) for name, rows, heads in projections),
        )
    if config.qk_norm:
        yield WeightSpec("layers.attention.query_norm", "vector", (Source(f"{attention}.q_norm.weight", (head_dim,)),))
        yield WeightSpec("layers.attention.key_norm", "vector", (Source(f"{attention}.k_norm.weight", (head_dim,)),))
    output = Source(f"{attention}.o_proj.weight", (hidden, query_rows), "query_heads", dim=1)
    yield WeightSpec("layers.attention.output", "matrix", (output,))
    if config.output_bias:
        bias = Source(f"{attention}.o_proj.bias", (hidden,), "once")
        yield WeightSpec("layers.attention.output_bias", "vector", (bias,))
    yield WeightSpec("layers.mlp_norm", "vector", (Source(f"{prefix}.post_attention_layernorm.weight", (hidden,)),))
    yield WeightSpec(
        "layers.mlp.gate_up",
        "matrix",
        tuple(
            Source(f"{prefix}.mlp.{name}.weight", (intermediate, hidden), "intermediate")
            for name in ("gate_proj", "up_proj")
        ),
    )
    down = Source(f"{prefix}.mlp.down_proj.weight", (hidden, intermediate), "intermediate", dim=1)
    yield WeightSpec("layers.mlp.down", "matrix", (down,))


def load_weights(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor | ops.QuantizedTensor]],
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[int], None] = lambda _: None,
    borrowed: Mapping[str, ops.Matrix] | None = None,
    shard: Shard | None = None,
    packing: Packing = Packing(),
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
    stacks = _Stacks(config.num_layers, dtype, device, packing)
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

    def __init__(self, spec: WeightSpec, sharding: Sharding | None, stacks: "_Stacks") -> None:
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


class _Stacks:
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
            self._weights[spec.name] = self._like.new_empty((self._num_layers, *shape))
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


def dummy_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    shard: Shard | None = None,
    packing: Packing = Packing(),
) -> Weights:
    """Return random weights of the real shapes, scaled so that activations neither vanish nor explode.

    A rank's are its part of the whole model's, each of which is made for it in turn.
    """
    sharding = Sharding(config, shard) if shard is not None else None
    generator = torch.Generator(device).manual_seed(seed)
    stacks = _Stacks(config.num_layers, dtype, device, packing)
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
    config: ModelConfig, weights: Mapping[str, Any], device: torch.device, packing: Packing = Packing()
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
