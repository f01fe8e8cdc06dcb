"""A target and its draft as transformers' modules: what is trained is made of the target's own layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dispec.engine.loading.checkpoint import Checkpoint


def transformers_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a checkpoint, on the device and in eval mode; a quantised one dequantised."""
    from transformers import AutoModelForCausalLM, GgufConfig

    options: dict[str, Any] = {}
    directory = checkpoint.directory
    if checkpoint.files[0].suffix == ".gguf":
        directory = checkpoint.files[0].parent
        options = {"gguf_file": checkpoint.files[0].name, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).to(device).eval()


def chosen_layers(num_layers: int, wanted: int) -> list[int]:
    """Layers of the target that a draft begins with: the first, the last, and others evenly between.

    Raises ValueError if the target does not have more than that.
    """
    if not 1 <= wanted < num_layers:
        raise ValueError(f"layers is {wanted}, must be between 1 and {num_layers - 1}: the target has {num_layers}")
    if wanted == 1:
        return [0]
    return [round(index * (num_layers - 1) / (wanted - 1)) for index in range(wanted)]


def draft_of(target: Any, num_layers: int) -> Any:
    """A model of `num_layers` layers of the target, copied, in float32; embedding and head copied as well."""
    from transformers import AutoModelForCausalLM

    config = type(target.config)(**{**target.config.to_dict(), "num_hidden_layers": num_layers, "layer_types": None})
    draft = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(next(target.parameters()).device)
    layers = chosen_layers(target.config.num_hidden_layers, num_layers)
    draft.load_state_dict(dict(_renumbered(target.state_dict(), layers)))
    return draft


def _renumbered(state: Mapping[str, Tensor], layers: list[int]) -> list[tuple[str, Tensor]]:
    """The state with only those layers, numbered from 0."""
    places = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(layers)}
    found = []
    for name, tensor in state.items():
        if not name.startswith("model.layers."):
            found.append((name, tensor))
        for old, new in places.items():
            if name.startswith(old):
                found.append((new + name.removeprefix(old), tensor))
    return found
