"""A target and its draft as models of transformers."""

import importlib.util
from typing import Any

import torch

from dispec.engine.loading.checkpoint import Checkpoint


def transformers_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a checkpoint's model in eval mode, dequantised if it is quantised.

    Raises ValueError for a GGUF file without the package that transformers reads it with.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    options: dict[str, Any] = {}
    directory = checkpoint.directory
    if checkpoint.files[0].suffix == ".gguf":
        if importlib.util.find_spec("accelerate") is None:
            raise ValueError('transformers reads GGUF files with accelerate: pip install "dispec[bench]"')
        directory = checkpoint.files[0].parent
        options = {"gguf_file": checkpoint.files[0].name, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).to(device).eval()


def chosen_layers(num_layers: int, wanted: int) -> list[int]:
    """Return the layers of the target that a draft starts from: the first, the last, and others evenly between.

    Raises ValueError unless the target has more than `wanted` layers.
    """
    if not 1 <= wanted < num_layers:
        raise ValueError(f"layers is {wanted}, must be between 1 and {num_layers - 1}: the target has {num_layers}")
    if wanted == 1:
        return [0]
    return [round(index * (num_layers - 1) / (wanted - 1)) for index in range(wanted)]


def draft_of(target: Any, num_layers: int) -> Any:
    """Return a float32 model of `num_layers` copied layers of the target, with its embedding, norm and head."""
    from transformers import AutoModelForCausalLM

    config = type(target.config)(**{**target.config.to_dict(), "num_hidden_layers": num_layers, "layer_types": None})
    draft = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(target.device)
    layers = target.model.layers
    target.model.layers = torch.nn.ModuleList(layers[index] for index in chosen_layers(len(layers), num_layers))
    draft.load_state_dict(target.state_dict())
    target.model.layers = layers
    return draft
