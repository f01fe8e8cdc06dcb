"""Write a quantised model as a Hugging Face directory in the pack-quantized format of compressed-tensors.

transformers loads this format on every device with a package that is all Python; GPTQ's own layout needs one that is
built for CUDA.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dispec.engine.loading.model_source import INDEX
from dispec.ops import QuantizedTensor

_COPIED = (".json", ".jinja", ".txt", ".model")  # of the tokenizer and the generation


class QuantizedDirectory:
    """A directory that gets a file of weights at a time. It is no model until `finish`."""

    def __init__(self, directory: Path) -> None:
        """Raises ValueError if the directory cannot be made or is not empty."""
        self._directory = directory
        self._file_of: dict[str, str] = {}
        self._size = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if any(directory.iterdir()):
                raise ValueError(f"out is {directory}, must be a new or an empty directory")
        except OSError as error:
            raise ValueError(f"out is {directory}, which cannot be written: {error.strerror}") from error

    def add(self, tensors: Mapping[str, Tensor | QuantizedTensor]) -> None:
        """Write tensors to a file of their own."""
        plain: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, QuantizedTensor):
                plain |= {f"{name.removesuffix('weight')}{part}": one for part, one in _parts(tensor).items()}
            else:
                plain[name] = tensor.contiguous()
        file = f"model-{len(set(self._file_of.values())) + 1:05}.safetensors"
        _save(self._directory / file, plain)
        self._file_of |= dict.fromkeys(plain, file)
        self._size += sum(tensor.nbytes for tensor in plain.values())

    def finish(self, config: dict[str, Any], tokenizer: Path) -> None:
        """Write the index and config.json, and copy the files of the tokenizer's directory."""
        for file in sorted(tokenizer.iterdir()):
            if file.suffix in _COPIED and file.name not in ("config.json", INDEX):
                shutil.copyfile(file, self._directory / file.name)
        index = {"metadata": {"total_size": self._size}, "weight_map": self._file_of}
        _write(self._directory / INDEX, index)
        _write(self._directory / "config.json", config)


def pack_quantized_config(bits: int, group_size: int, *, act_order: bool) -> dict[str, Any]:
    """Return the `quantization_config` of matrices with symmetric groups."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }
    if act_order:
        weights["actorder"] = "static"
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }


def _parts(matrix: QuantizedTensor) -> dict[str, Tensor]:
    assert matrix.offsets is None
    assert matrix.column_order is None
    codes = matrix.codes.cpu()
    if matrix.kind == "int4":
        nibbles = (codes + 8).view(torch.uint8)
        stored = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    else:
        stored = codes.view(torch.uint8) ^ 128
    return {
        "weight_packed": stored.contiguous().view(torch.int32),
        "weight_scale": matrix.scales.cpu().half(),
        "weight_shape": torch.tensor(matrix.shape),
    }


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file with the mode that the umask gives; `save_file` alone makes one that its owner alone can read."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, {"format": "pt"})
    path.chmod(mode)


def _write(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
