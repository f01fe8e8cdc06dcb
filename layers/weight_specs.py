"""Every weight of a model, declared once: its place in `Weights`, its shape, and its names in a checkpoint.

Loading, dummy weights and tests derive from `declare`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from dispec.layers.config import ModelConfig
from dispec.layers.sharding import Axis, Part, Sharding


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
