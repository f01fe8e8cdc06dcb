"""Every weight of a model, declared once: its place in `Weights`, shape and names in a checkpoint.

Loading, dummy weights and tests all derive from `declare`. The weights of all layers are one tensor each, stacked; a
checkpoint streams into its slices.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dispec import ops
from dispec.layers.config import ModelConfig, Shard
from dispec.layers.rope import rope_frequencies
from dispec.layers.sharding import Axis, Part, Sharding
from dispec.layers.types import AttentionWeights, BlockWeights, MlpWeights, Weights

Stack = ops.Matrix | tuple[ops.PackedWeight, ...]


@runtime_checkable
class Pack(Protocol):
    """What makes of a matrix what `ops.linear` takes: `ops.pack`, or a partial application of it."""

    def __call__(self, weight: Tensor, *, out: Tensor | None = None) -> ops.Matrix: ...


class WeightsError(ValueError):
    """A checkpoint's tensors do not match the model's declaration; the message names the tensor."""


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, by its Hugging Face name, that fills some rows of a weight.

    splits: what dimension `dim` counts, if ranks share it among themselves.
    """

    name: str
    shape: tuple[int, ...]
    splits: Axis | None = None
    dim: int = 0

    def part(self, sharding: Sharding | None) -> Part:
        """What of dimension `dim` a rank has; all of it without ranks."""
        whole = self.shape[self.dim]
        return Part(0, whole, whole) if sharding is None else sharding.part(self.splits, whole)

    def local_shape(self, sharding: Sharding | None) -> tuple[int, ...]:
        """The shape of a rank's part."""
        return (*self.shape[: self.dim], self.part(sharding).size, *self.shape[self.dim + 1 :])


@dataclass(frozen=True)
class WeightSpec:
    """One weight: `name` is its path in `Weights`, `layer` its place in the stack there, None for a weight outside of
    the layers; its sources are stacked along the first dimension.

    A `matrix` is only ever multiplied by, so it may be packed; a `table` is looked up by row; a `vector` is
    used elementwise.
    """

    name: str
    kind: Literal["matrix", "table", "vector"]
    sources: tuple[Source, ...]
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.local_shape(None)

    def local_shape(self, sharding: Sharding | None) -> tuple[int, ...]:
        """The shape of a rank's part."""
        shapes = [source.local_shape(sharding) for source in self.sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def declare(config: ModelConfig) -> Iterator[WeightSpec]:
    """All weights of a model, in the order of the forward pass."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield WeightSpec("embedding", "table", (Source("model.embed_tokens.weight", (vocab, hidden), "vocabulary"),))
    for layer in range(config.num_layers):
        for spec in _declare_block(config, f"model.layers.{layer}"):
            yield replace(spec, layer=layer)
    yield WeightSpec("final_norm", "vector", (Source("model.norm.weight", (hidden,)),))
    if not config.tie_embeddings:
        yield WeightSpec("lm_head", "matrix", (Source("lm_head.weight", (vocab, hidden), "vocabulary"),))


def _declare_block(config: ModelConfig, prefix: str) -> Iterator[WeightSpec]:
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    projections: tuple[tuple[str, int, Axis], ...] = (
        ("q_proj", query_rows, "query_heads"),
        ("k_proj", kv_rows, "kv_heads"),
        ("v_proj", kv_rows, "kv_heads"),
    )
    attention = f"{prefix}.self_attn"
    yield WeightSpec("blocks.attention_norm", "vector", (Source(f"{prefix}.input_layernorm.weight", (hidden,)),))
    yield WeightSpec(
        "blocks.attention.qkv",
        "matrix",
        tuple(Source(f"{attention}.{name}.weight", (rows, hidden), heads) for name, rows, heads in projections),
    )
    if config.qkv_bias:
        yield WeightSpec(
            "blocks.attention.qkv_bias",
            "vector",
            tuple(Source(f"{attention}.{name}.bias", (rows,), heads) for name, rows, heads in projections),
        )
    if config.qk_norm:
        yield WeightSpec("blocks.attention.query_norm", "vector", (Source(f"{attention}.q_norm.weight", (head_dim,)),))
        yield WeightSpec("blocks.attention.key_norm", "vector", (Source(f"{attention}.k_norm.weight", (head_dim,)),))
    output = Source(f"{attention}.o_proj.weight", (hidden, query_rows), "query_heads", dim=1)
    yield WeightSpec("blocks.attention.output", "matrix", (output,))
    if config.output_bias:
        bias = Source(f"{attention}.o_proj.bias", (hidden,), "once")
        yield WeightSpec("blocks.attention.output_bias", "vector", (bias,))
    yield WeightSpec("blocks.mlp_norm", "vector", (Source(f"{prefix}.post_attention_layernorm.weight", (hidden,)),))
    yield WeightSpec(
        "blocks.mlp.gate_up",
        "matrix",
        tuple(
            Source(f"{prefix}.mlp.{name}.weight", (intermediate, hidden), "intermediate")
            for name in ("gate_proj", "up_proj")
        ),
    )
    down = Source(f"{prefix}.mlp.down_proj.weight", (hidden, intermediate), "intermediate", dim=1)
    yield WeightSpec("blocks.mlp.down", "matrix", (down,))


@dataclass
class _Loading:
    """A weight that is being filled, source by source."""

    spec: WeightSpec
    tensor: Tensor
    sharding: Sharding | None
    waiting: dict[str, tuple[Source, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting, row = {}, 0
        for source in self.spec.sources:
            self.waiting[source.name] = (source, row)
            row += source.local_shape(self.sharding)[0]

    def fill(self, name: str, tensor: Tensor) -> None:
        """Copy a rank's part of a source. Of a mapped file no other rows are read, and other columns only where they
        share a page of memory with its own. Raises WeightsError for a tensor of another shape."""
        source, row = self.waiting.pop(name)
        if tuple(tensor.shape) != source.shape:
            raise WeightsError(
                f"tensor {name!r} has shape {list(tensor.shape)}, the config calls for {list(source.shape)}"
            )
        part = source.part(self.sharding)
        rows = self.tensor[row : row + source.local_shape(self.sharding)[0]]
        count = part.stop - part.start
        rows.narrow(source.dim, 0, count).copy_(tensor.narrow(source.dim, part.start, count))
        rows.narrow(source.dim, count, part.size - count).zero_()


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
    """Stream a checkpoint's tensors into place, one at a time; each matrix is packed once it is whole.

    Peak memory is that of the weights and of one matrix that is not packed yet.

    `tensors` yields (Hugging Face name, tensor) in any order; `on_progress` hears of each one's elements. `borrowed`
    weights, by their names in `Weights`, are another model's and not among the tensors. `shard`: the rank whose part
    of the model `config` is wanted. `pack` lays matrices out for `ops.linear`.
    Raises WeightsError, with the name, for a tensor that is missing, left over, doubled or misshapen.
    """
    borrowed = borrowed or {}
    sharding = Sharding(config, shard) if shard is not None else None
    own = (spec for spec in declare(config) if spec.name not in borrowed)
    place_of = {source.name: spec for spec in own for source in spec.sources}
    stacks = _Stacks(config.num_layers, dtype, device, pack)
    loading: dict[WeightSpec, _Loading] = {}
    done: set[WeightSpec] = set()
    for name, tensor in tensors:
        spec = place_of.get(name)
        if spec is None:
            raise WeightsError(f"tensor {name!r} of the checkpoint has no place in a {config.architecture}")
        if spec in done or (spec in loading and name not in loading[spec].waiting):
            raise WeightsError(f"tensor {name!r} occurs twice in the checkpoint")
        if spec not in loading:
            loading[spec] = _Loading(spec, stacks.room(spec, spec.local_shape(sharding)), sharding)
        loading[spec].fill(name, tensor)
        on_progress(tensor.numel())
        if not loading[spec].waiting:
            stacks.finish(spec, loading.pop(spec).tensor)
            done.add(spec)
    missing = [
        name
        for name, spec in place_of.items()
        if spec not in done and (spec not in loading or name in loading[spec].waiting)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsError(f"tensor {missing[0]!r}{more} is missing from the checkpoint")
    return assemble(config, {**stacks.weights(), **borrowed}, device, pack)


class _Stacks:
    """Weights by their names in `Weights`, filled one layer at a time."""

    def __init__(self, num_layers: int, dtype: torch.dtype, device: torch.device, pack: Pack) -> None:
        self._num_layers = num_layers
        self._pack = pack
        self._like = torch.empty(2, 2, dtype=dtype, device=device)
        self._packs = isinstance(pack(self._like), ops.PackedWeight)
        self._single: dict[str, ops.Matrix] = {}
        self._plain: dict[str, Tensor] = {}
        self._tiled: dict[str, ops.PackedWeight] = {}
        self._opaque: dict[str, dict[int, ops.PackedWeight]] = {}

    def room(self, spec: WeightSpec, shape: tuple[int, ...]) -> Tensor:
        """Return where a weight of that shape is to be written: its final place, unless it is packed once whole."""
        if spec.layer is None or (self._packs and spec.kind == "matrix"):
            return self._like.new_empty(shape)
        if spec.name not in self._plain:
            self._plain[spec.name] = self._like.new_empty((self._num_layers, *shape))
        return self._plain[spec.name][spec.layer]

    def finish(self, spec: WeightSpec, tensor: Tensor) -> None:
        """Take a weight that is whole."""
        if spec.layer is None:
            self._single[spec.name] = self._pack(tensor) if spec.kind == "matrix" else tensor
        elif self._packs and spec.kind == "matrix":
            self._pack_layer(spec.name, spec.layer, tensor)

    def _pack_layer(self, name: str, layer: int, matrix: Tensor) -> None:
        if name not in self._tiled:
            packed = self._pack(matrix)
            assert isinstance(packed, ops.PackedWeight)
            if packed.blocked.is_mkldnn:
                self._opaque.setdefault(name, {})[layer] = packed
                return
            stack = packed.blocked.new_empty((self._num_layers, *packed.blocked.shape))
            self._tiled[name] = ops.PackedWeight(stack, packed.out_features)
        self._pack(matrix, out=self._tiled[name].blocked[layer])

    def weights(self) -> dict[str, Stack]:
        """Return all weights, once they are whole."""
        opaque = {
            name: tuple(found[layer] for layer in range(self._num_layers)) for name, found in self._opaque.items()
        }
        return {**self._single, **self._plain, **self._tiled, **opaque}


def dummy_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    shard: Shard | None = None,
    pack: Pack = ops.pack,
) -> Weights:
    """Random weights of the real shapes, scaled so that activations neither vanish nor explode.

    Those of a rank are its part of the same weights, which are made one after another for it.
    """
    sharding = Sharding(config, shard) if shard is not None else None
    generator = torch.Generator(device).manual_seed(seed)
    stacks = _Stacks(config.num_layers, dtype, device, pack)

    def make(spec: WeightSpec) -> Tensor:
        room = stacks.room(spec, spec.local_shape(sharding))
        if sharding is None:
            return _fill_dummy(spec, room, generator)
        weight = _Loading(spec, room, sharding)
        whole = _fill_dummy(spec, torch.empty(spec.shape, dtype=dtype, device=device), generator)
        rows = whole.split([source.shape[0] for source in spec.sources])
        for source, tensor in zip(spec.sources, rows, strict=True):
            weight.fill(source.name, tensor)
        return room

    for spec in declare(config):
        stacks.finish(spec, make(spec))
    return assemble(config, stacks.weights(), device, pack)


def _fill_dummy(spec: WeightSpec, weight: Tensor, generator: torch.Generator) -> Tensor:
    if spec.kind == "vector":
        return weight.fill_(0.0 if spec.name.endswith("_bias") else 1.0)
    deviation = 1.0 if spec.kind == "table" else spec.shape[1] ** -0.5
    return weight.normal_(0.0, 0.5 * deviation, generator=generator)


def assemble(config: ModelConfig, weights: Mapping[str, Any], device: torch.device, pack: Pack = ops.pack) -> Weights:
    """Build the `Weights` tree from weights by their declared names."""
    embedding = weights["embedding"]
    lm_head = weights.get("lm_head")
    if lm_head is None:  # tied
        lm_head = pack(embedding)
        if isinstance(lm_head, ops.PackedWeight) and lm_head.has_readable_rows:
            embedding = lm_head
    return Weights(
        embedding=embedding,
        blocks=BlockWeights(
            attention_norm=weights["blocks.attention_norm"],
            attention=AttentionWeights(
                qkv=weights["blocks.attention.qkv"],
                output=weights["blocks.attention.output"],
                qkv_bias=weights.get("blocks.attention.qkv_bias"),
                output_bias=weights.get("blocks.attention.output_bias"),
                query_norm=weights.get("blocks.attention.query_norm"),
                key_norm=weights.get("blocks.attention.key_norm"),
            ),
            mlp_norm=weights["blocks.mlp_norm"],
            mlp=MlpWeights(gate_up=weights["blocks.mlp.gate_up"], down=weights["blocks.mlp.down"]),
        ),
        final_norm=weights["final_norm"],
        lm_head=lm_head,
        rope_frequencies=rope_frequencies(config).to(device),
    )
