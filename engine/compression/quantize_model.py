"""Quantise a model and write it as a checkpoint."""

import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from dispec.engine.compression.calibration import CalibratedLayers
from dispec.engine.compression.gptq import Hessian, gptq, output_error, round_to_nearest
from dispec.engine.compression.quantized_directory import QuantizedDirectory, pack_quantized_config
from dispec.engine.compression.recipe import Recipe
from dispec.engine.json_file import read_json
from dispec.engine.loading.checkpoint import Checkpoint, find_checkpoint
from dispec.engine.text.tokenizer import Tokenizer
from dispec.layers.config import hugging_face_config
from dispec.ops import QuantizedTensor

log = logging.getLogger("dispec")


def quantize_model(
    model: str, recipe: Recipe, calibration: Path | None, out: Path, device: torch.device, *, show_progress: bool
) -> None:
    """Write a model with the matrices of its layers quantised; embedding and head stay as they are.

    Layers are read, quantised and written one by one. A GGUF model is dequantised to bfloat16 first.
    calibration: a UTF-8 text; None for the topics of Python's help. Raises ValueError for a model, text or directory
    that cannot be used, CheckpointError as `find_checkpoint`.
    """
    checkpoint = find_checkpoint(model)
    if checkpoint.quantization is not None:
        raise ValueError(f"model is {model!r}, which is quantised already ({checkpoint.quantization.describe()})")
    config = checkpoint.config
    group_size = recipe.group_size_for(config)
    is_calibrated = recipe.method == "gptq"
    raw = _raw_config(checkpoint)
    directory = QuantizedDirectory(out)
    # Views of the mapped files, of which a layer at a time is read.
    tensors = {name: tensor for name, tensor in checkpoint.tensors(torch.bfloat16) if isinstance(tensor, Tensor)}
    layers: CalibratedLayers | None = None
    if is_calibrated:
        tokens = _tokens(checkpoint, recipe, calibration)
        layers = CalibratedLayers(config, tensors["model.embed_tokens.weight"], tokens, device)
    errors: list[tuple[float, float]] = []

    def by_gptq(matrices: dict[str, Tensor], hessian: Hessian) -> dict[str, QuantizedTensor]:
        whole, mean = torch.cat(list(matrices.values())), hessian.mean()
        quantized = gptq(whole, mean, recipe.bits, group_size, act_order=recipe.act_order)
        nearest = round_to_nearest(whole, recipe.bits, group_size)
        errors.append(
            (output_error(whole, quantized.dequantize(), mean), output_error(whole, nearest.dequantize(), mean))
        )
        found, start = {}, 0
        for name, matrix in matrices.items():
            found[name] = quantized.narrow(0, start, matrix.shape[0])
            start += matrix.shape[0]
        return found

    for layer in tqdm(range(config.num_layers), desc="quantising", unit="layer", disable=not show_progress):
        prefix = f"model.layers.{layer}."
        given = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        if layers is not None:
            quantized = dict(layers.quantize_layer(given, by_gptq))
        else:
            quantized = {
                name: round_to_nearest(matrix.to(device), recipe.bits, group_size)
                for name, matrix in given.items()
                if name.endswith("_proj.weight")
            }
        directory.add({f"{prefix}{name}": tensor for name, tensor in (given | quantized).items()})
    directory.add(tensors)
    act_order = is_calibrated and recipe.act_order
    raw["quantization_config"] = pack_quantized_config(recipe.bits, group_size, act_order=act_order)
    directory.finish(raw, checkpoint.directory)
    if errors:
        ours, nearest = (sum(column) / len(errors) for column in zip(*errors, strict=True))
        log.info("mean squared error of outputs: %.3f %%, %.3f %% if rounded to the nearest", 100 * ours, 100 * nearest)


def _raw_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the contents of the model's config.json, or those that a GGUF model would have."""
    if checkpoint.files[0].suffix != ".gguf":
        raw = read_json(checkpoint.files[0].parent / "config.json")
        return raw | {"tie_word_embeddings": checkpoint.config.tie_embeddings}
    end = list(checkpoint.eos_token_ids)
    return hugging_face_config(checkpoint.config) | {"eos_token_id": end, "dtype": "bfloat16"}


def _tokens(checkpoint: Checkpoint, recipe: Recipe, calibration: Path | None) -> Int[Tensor, "S L"]:
    """Return pieces of the text that are spread evenly over it, as many as it has up to the recipe's."""
    length = min(recipe.sample_length, checkpoint.config.max_position_embeddings)
    ids = Tokenizer.from_directory(checkpoint.directory).encode(_text(calibration))
    count = min(recipe.num_samples, len(ids) // length)
    if count == 0:
        raise ValueError(f"calibration has {len(ids)} tokens, must have at least {length}: give a longer text")
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return torch.tensor([ids[start : start + length] for start in starts])


def _text(calibration: Path | None) -> str:
    if calibration is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    try:
        return calibration.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"calibration is {calibration}, which cannot be read ({error})") from error
