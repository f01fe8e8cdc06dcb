"""transformers as a contestant: the same weights, or random ones of the same shapes."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

from bench.geometries import geometry
from engine.checkpoint import Checkpoint


def transformers_model(
    name: str, checkpoint: Checkpoint | None, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """The model of a checkpoint, or of the named geometry where there is none, on the device and in eval mode."""
    if checkpoint is None:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**geometry(name)), dtype=dtype)
        return model.eval()
    options: dict[str, Any] = {}
    directory = checkpoint.directory
    if checkpoint.files[0].suffix == ".gguf":
        directory = checkpoint.files[0].parent
        options = {"gguf_file": checkpoint.files[0].name, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).to(device).eval()
