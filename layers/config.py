"""The shape of a model, read from a Hugging Face config. A model family is a set of flags."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

_VOCAB_TILE = 32  # rows of the vocabulary that stay in one rank: a kernel's tile


class UnsupportedModelError(ValueError):
    """The model has a feature that this engine does not implement; the message names it."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotation frequencies are scaled for contexts longer than those of the training.

    kind: `linear` divides all frequencies by `factor` (position interpolation, arXiv:2306.15595). `llama3` divides low
        frequencies, keeps high ones, and interpolates between (Llama 3.1). `yarn` interpolates over the dimension
        index, and has a temperature on the attention (arXiv:2309.00071). `frequency_factors` has a divisor for each
        frequency, as GGUF files do.
    """

    kind: Literal["linear", "llama3", "yarn", "frequency_factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    frequency_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Shard:
    """One of the `size` ranks of a tensor-parallel model, and the name of their process group."""

    rank: int
    size: int
    group: str

    def vocab_rows(self, vocab_size: int) -> int:
        """Return the number of tokens of the vocabulary that every rank has room for."""
        return -(-vocab_size // (self.size * _VOCAB_TILE)) * _VOCAB_TILE


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with grouped-query attention, rotary positions, RMS norms and a gated SiLU MLP.

    Hashable and compared by value, so that it can be the key of a compiled graph. With a `shard`, heads and
    intermediate size are those of the rank.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    shard: Shard | None = None

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"model config: {field} is {getattr(self, field)}, must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model config: num_heads ({self.num_heads}) is not a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"model config: head_dim is {self.head_dim}, rotary positions need an even number")

    @property
    def num_parameters(self) -> int:
        """The number of weights; tied ones count once."""
        heads, width = self.num_heads + 2 * self.num_kv_heads, self.num_heads * self.head_dim
        attention = self.hidden_size * (heads * self.head_dim + width)
        biases = heads * self.head_dim * self.qkv_bias + self.hidden_size * self.output_bias
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        layer = attention + biases + norms + 3 * self.hidden_size * self.intermediate_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return tables + self.num_layers * layer + self.hidden_size

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def rope_attention_factor(self) -> float:
        """The multiplier of cosine and sine."""
        return self.rope_scaling.attention_factor if self.rope_scaling else 1.0


class _Family(NamedTuple):
    """The properties that the architectures of a family share.

    optional_bias: whether `attention_bias` adds biases to all four projections.
    defaults: of fields that a `config.json` leaves out, as in transformers' config classes.
    """

    qkv_bias: bool
    qk_norm: bool
    optional_bias: bool
    defaults: Mapping[str, int]


_QWEN_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(qkv_bias=False, qk_norm=False, optional_bias=True, defaults=_LLAMA_DEFAULTS),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, qk_norm=False, optional_bias=False, defaults=_QWEN_DEFAULTS),
    "Qwen3ForCausalLM": _Family(
        qkv_bias=False, qk_norm=True, optional_bias=True, defaults=_QWEN_DEFAULTS | {"head_dim": 128}
    ),
}
_DEFAULT_THETA = 10000.0


def config_from_hugging_face(raw: Mapping[str, Any]) -> ModelConfig:
    """Return the model of a `config.json`, in the layout of transformers 4 or 5, read as transformers 5 does.

    Raises UnsupportedModelError for a feature that is not implemented, ValueError for a missing or invalid field.
    """
    architectures = raw.get("architectures") or []
    architecture = next((name for name in architectures if name in _FAMILIES), None)
    if architecture is None:
        raise UnsupportedModelError(
            f"architectures {architectures or 'missing'}: supported are {', '.join(sorted(_FAMILIES))}"
        )
    _refuse_unsupported(raw)
    family = _FAMILIES[architecture]
    given = {**family.defaults, **raw}
    hidden_size, num_heads = int(_required(given, "hidden_size")), int(_required(given, "num_attention_heads"))
    max_positions = int(_required(given, "max_position_embeddings"))
    biased = family.optional_bias and bool(raw.get("attention_bias", False))
    rope = _rope_settings(raw)
    scaling = _rope_scaling(rope, max_positions)
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(_required(given, "vocab_size")),
        hidden_size=hidden_size,
        intermediate_size=int(_required(given, "intermediate_size")),
        num_layers=int(_required(given, "num_hidden_layers")),
        num_heads=num_heads,
        num_kv_heads=int(given.get("num_key_value_heads") or num_heads),
        head_dim=int(given.get("head_dim") or hidden_size // num_heads),
        max_position_embeddings=_context_length(scaling, max_positions),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or _DEFAULT_THETA),
        rope_scaling=scaling,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias or biased,
        output_bias=biased,
        qk_norm=family.qk_norm,
    )


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """Return a `config.json` that `config_from_hugging_face` and transformers read as the given model.

    Raises UnsupportedModelError if it has no field for the model's rotary positions.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        fields = {
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            "yarn": (
                *("factor", "beta_fast", "beta_slow", "attention_factor", "truncate"),
                "original_max_position_embeddings",
            ),
        }.get(scaling.kind)
        if fields is None:
            raise UnsupportedModelError(f"rope scaling {scaling.kind!r} has no form in a config.json")
        rope |= {"rope_type": scaling.kind} | {field: getattr(scaling, field) for field in fields}
    return {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "hidden_act": "silu",
    }


def config_warnings(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield warnings about fields of a `config.json` that transformers 5 reads in a surprising way."""
    replaced, theta = raw.get("rope_parameters") or {}, raw.get("rope_theta") or _DEFAULT_THETA
    scaling = raw.get("rope_scaling")
    if scaling and not scaling.get("rope_theta") and replaced.get("rope_theta", theta) != theta:
        yield (
            f"rope_scaling replaces rope_parameters with its rope_theta of {replaced['rope_theta']}: rope_theta is"
            f" {theta} now, as in transformers, unless it is written into rope_scaling"
        )


def _required(raw: Mapping[str, Any], field: str) -> Any:
    if raw.get(field) is None:
        raise ValueError(f"config.json: {field} is missing")
    return raw[field]


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    sliding = [kind for kind in raw.get("layer_types") or [] if kind != "full_attention"]
    if sliding or raw.get("use_sliding_window"):
        raise UnsupportedModelError(f"sliding-window layers ({sliding[0] if sliding else 'use_sliding_window'})")
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act {activation!r}: only silu is supported")
    if raw.get("mlp_bias"):
        raise UnsupportedModelError("mlp_bias")
    rope = _rope_settings(raw)
    by_layer_type = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if by_layer_type:
        raise UnsupportedModelError(f"rotary positions by layer type ({by_layer_type[0]})")
    partial = raw.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor {partial}")


def _rope_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of rotary positions, as transformers 5 chooses them.

    `rope_scaling` is the older name, which model cards recommend for long contexts: it replaces `rope_parameters`. An
    original context length outside of both takes precedence.
    """
    settings = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if original := raw.get("original_max_position_embeddings"):
        settings["original_max_position_embeddings"] = original
    return settings


def _context_length(scaling: RopeScaling | None, max_positions: int) -> int:
    """Return the longest context. Configs with YaRN often keep the `max_position_embeddings` of the training: the
    context is then the original length times the factor."""
    if scaling is None or scaling.kind != "yarn":
        return max_positions
    return max(max_positions, int(scaling.original_max_position_embeddings * scaling.factor))


def _rope_scaling(rope: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=float(_required(rope, "factor")))
    original = int(rope.get("original_max_position_embeddings") or max_positions)
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=float(_required(rope, "factor")),
            low_freq_factor=float(_required(rope, "low_freq_factor")),
            high_freq_factor=float(_required(rope, "high_freq_factor")),
            original_max_position_embeddings=original,
        )
    if kind == "yarn":
        factor = float(rope.get("factor") or max_positions / original)
        return RopeScaling(
            "yarn",
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            attention_factor=yarn_attention_factor(
                factor, rope.get("attention_factor"), rope.get("mscale"), rope.get("mscale_all_dim")
            ),
            truncate=bool(rope.get("truncate", True)),
        )
    raise UnsupportedModelError(f"rope scaling {kind!r}: supported are linear, llama3, yarn")


def yarn_attention_factor(
    factor: float, given: float | None = None, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Return the multiplier of cosine and sine for YaRN's softmax temperature (arXiv:2309.00071, section 3.4)."""

    def temperature(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if given is not None:
        return float(given)
    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)
