"""Models of benchmarks: by name, or the shapes of a real model with random weights."""

import sys
from typing import Annotated, Any

import typer

from dispec.bench.geometries import NAMES, model_config
from dispec.engine.api.llm import LLM
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.layers.config import ModelConfig

Model = Annotated[
    str, typer.Option(help=f"Directory, hub id, .gguf file, built-in name, or shapes: {', '.join(NAMES)}.")
]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 (CUDA only) or float32.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="cuda if there is one")]
EnforceEager = Annotated[bool, typer.Option(help="Disable compilation.")]


def load(model: str, **options: Any) -> LLM:
    """Start an `LLM` of a model or a named geometry."""
    options["show_progress"] = sys.stderr.isatty()
    if model in NAMES:
        return LLM(model_config(model), load_format="dummy", **options)
    return LLM(model, **options)


def config_of(model: str) -> ModelConfig:
    """Return a model's config without loading weights."""
    return model_config(model) if model in NAMES else find_checkpoint(model).config


def useful_kv_memory(config: ModelConfig, sequences: int, tokens: int, dtype_bytes: int, block_size: int = 32) -> int:
    """Return the bytes of a KV cache for `sequences` of `tokens`, so that a peer's cache fits on the same device."""
    block = 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size * dtype_bytes
    return (sequences * (-(-tokens // block_size) + 1) + 1) * block
