"""Every weight of a model, declared once: its place in `Weights`, its shape, and its names in a checkpoint.

Loading, dummy weights and tests derive from `declare`. The weights of all layers are stacked in one tensor each; a
checkpoint is streamed into its slices.
"""

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

Stack = ops.Matrix | tuple[ops.PackedWeight, ...]
# Lays a matrix out for `ops.linear`: `ops.pack`, or a partial application of it.
Pack = Callable[..., ops.Matrix]


class WeightsError(ValueError):
    """A checkpoint's tensors do not match the model's declaration; the message names the tensor."""


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
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[int], None] = lambda _: None,
    borrowed: Mapping[str, ops.Matrix] | None = None,
    shard: Shard | None = None,
    pack: Pack = ops.pack,
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
    stacks = _Stacks(config.num_layers, dtype, device, pack)
    missing: dict[WeightSpec, dict[str, tuple[Source, Tensor]]] = {}
    buffers: dict[WeightSpec, Tensor] = {}
    for name, tensor in tensors:
        spec = spec_of.get(name)
        if spec is None:
            raise WeightsError(f"tensor {name!r} of the checkpoint has no place in a {config.architecture}")
        if spec not in missing:
            buffers[spec] = stacks.allocate(spec, spec.local_shape(sharding))
            missing[spec] = {view[0].name: view for view in spec.views(buffers[spec], sharding)}
        if name not in missing[spec]:
            raise WeightsError(f"tensor {name!r} occurs twice in the checkpoint")
        _copy_part(*missing[spec].pop(name), tensor, sharding)
        on_progress(tensor.numel())
        if not missing[spec]:
            stacks.add(spec, buffers.pop(spec))
    absent = [name for name, spec in spec_of.items() if spec not in missing or name in missing[spec]]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise WeightsError(f"tensor {absent[0]!r}{more} is missing from the checkpoint")
    return assemble(config, {**stacks.weights(), **(borrowed or {})}, device, pack)


def _copy_part(source: Source, target: Tensor, tensor: Tensor, sharding: Sharding | None) -> None:
    """Copy a rank's part of a source, and zero the rest of the target.

    Of a memory-mapped file only the part's rows are read; of its columns, whole pages. Raises WeightsError for a tensor
    of another shape.
    """
    if tuple(tensor.shape) != source.shape:
        raise WeightsError(
            f"tensor {source.name!r} has shape {list(tensor.shape)}, the config calls for {list(source.shape)}"
        )
    part = source.part(sharding)
    count = part.stop - part.start
    target.narrow(source.dim, 0, count).copy_(tensor.narrow(source.dim, part.start, count))
    target.narrow(source.dim, count, part.size - count).zero_()


class _Stacks:
    """Weights by their names in `Weights`, those of the layers stacked."""

    def __init__(self, num_layers: int, dtype: torch.dtype, device: torch.device, pack: Pack) -> None:
        self._num_layers = num_layers
        self._pack = pack
        self._like = torch.empty(2, 2, dtype=dtype, device=device)
        self._packs = isinstance(pack(self._like), ops.PackedWeight)
        self._weights: dict[str, Any] = {}
        self._unstackable: dict[str, dict[int, ops.PackedWeight]] = {}

    def allocate(self, spec: WeightSpec, shape: tuple[int, ...]) -> Tensor:
        """Return uninitialised memory for a weight: its place in the stack, unless it is packed afterwards."""
        if spec.layer is None or (self._packs and spec.kind == "matrix"):
            return self._like.new_empty(shape)
        if spec.name not in self._weights:
            self._weights[spec.name] = self._like.new_empty((self._num_layers, *shape))
        return self._weights[spec.name][spec.layer]

    def add(self, spec: WeightSpec, tensor: Tensor) -> None:
        """Add a weight, once its values are complete."""
        if spec.layer is None:
            self._weights[spec.name] = self._pack(tensor) if spec.kind == "matrix" else tensor
        elif self._packs and spec.kind == "matrix":
            self._pack_layer(spec.name, spec.layer, tensor)

    def _pack_layer(self, name: str, layer: int, matrix: Tensor) -> None:
        if name not in self._weights:
            packed = self._pack(matrix)
            assert isinstance(packed, ops.PackedWeight)
            if packed.blocked.is_mkldnn:
                self._unstackable.setdefault(name, {})[layer] = packed
                return
            stack = packed.blocked.new_empty((self._num_layers, *packed.blocked.shape))
            self._weights[name] = ops.PackedWeight(stack, packed.out_features)
        self._pack(matrix, out=self._weights[name].blocked[layer])

    def weights(self) -> dict[str, Stack]:
        """Return all weights, once all were added."""
        layers = range(self._num_layers)
        return self._weights | {
            name: tuple(packed[layer] for layer in layers) for name, packed in self._unstackable.items()
        }


def dummy_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    shard: Shard | None = None,
    pack: Pack = ops.pack,
) -> Weights:
    """Return random weights of the real shapes, scaled so that activations neither vanish nor explode.

    A rank's are its part of the whole model's, each of which is made for it in turn.
    """
    sharding = Sharding(config, shard) if shard is not None else None
    generator = torch.Generator(device).manual_seed(seed)
    stacks = _Stacks(config.num_layers, dtype, device, pack)
    for spec in declare(config):
        # Nothing here refers to a weight while the next one is allocated.
        stacks.add(spec, _make_dummy(spec, stacks.allocate(spec, spec.local_shape(sharding)), sharding, generator))
    return assemble(config, stacks.weights(), device, pack)


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


def assemble(config: ModelConfig, weights: Mapping[str, Any], device: torch.device, pack: Pack = ops.pack) -> Weights:
    """Return the `Weights` of weights by their declared names."""
    embedding, lm_head = weights["embedding"], weights.get("lm_head")
    if lm_head is None:  # tied
        lm_head = pack(embedding)
        if isinstance(lm_head, ops.PackedWeight) and lm_head.has_readable_rows:
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
