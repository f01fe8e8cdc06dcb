"""transformers as a contestant: the same weights, or random ones of the same shapes."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dispec.bench.distillation.models import transformers_model as transformers_model_of
from dispec.bench.geometries import geometry
from dispec.engine.loading.checkpoint import Checkpoint


def transformers_model(
    name: str, checkpoint: Checkpoint | None, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """Return the model of a checkpoint, or of the named geometry without one, on the device in eval mode."""
    if checkpoint is None:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**geometry(name)), dtype=dtype)
        return model.eval()
    return transformers_model_of(checkpoint, dtype, device)
