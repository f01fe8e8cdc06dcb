"""Shapes of real models, for measurements with random weights."""

from typing import Any

from dispec.layers.config import ModelConfig, config_from_hugging_face

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}

# From the models' published config.json files.
_GEOMETRIES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _QWEN2
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "qwen2.5-1.5b": _QWEN2
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "qwen2.5-7b": _QWEN2
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}

NAMES = tuple(_GEOMETRIES)


def geometry(name: str) -> dict[str, Any]:
    """Return the config.json of a named shape. Raises ValueError for a name that is not in NAMES."""
    if name not in _GEOMETRIES:
        raise ValueError(f"geometry {name!r} is not one of {', '.join(NAMES)}")
    return dict(_GEOMETRIES[name])


def model_config(name: str) -> ModelConfig:
    """Return the `ModelConfig` of a named shape."""
    return config_from_hugging_face(geometry(name))
