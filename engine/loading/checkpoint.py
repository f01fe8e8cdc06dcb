"""Find a model (directory, hub id, GGUF file or built-in default) and stream its weights."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dispec.engine.errors import CheckpointError
from dispec.engine.json_file import read_json
from dispec.engine.loading.default_model import BUILT_IN_MODEL, DEFAULT_MODEL, BuiltInModel, default_model_file
from dispec.engine.loading.gguf_file import GgufFile
from dispec.engine.loading.model_source import (
    INDEX,
    download_small_files,
    download_weights,
    find_source,
    read_config,
    weight_files,
)
from dispec.engine.loading.quantization_config import QuantizationConfig, quantization_config
from dispec.engine.loading.quantized_checkpoint import read_quantized
from dispec.engine.loading.quantized_layout import find_quantized, read_headers
from dispec.engine.loading.tokenizer_check import added_token_id
from dispec.engine.loading.tokenizer_files import directory_tokenizer, gguf_tokenizer
from dispec.engine.text.tokenizer import Tokenizer, token_text
from dispec.layers.config import ModelConfig, config_warnings
from dispec.ops import QuantizedTensor

__all__ = ["DEFAULT_MODEL", "Checkpoint", "CheckpointError", "find_checkpoint"]

log = logging.getLogger("dispec")

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_ROWS = 4096  # of two matrices at a time: different ones mostly differ in the first rows


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine with a supported config and complete files.

    directory: of tokenizer and chat template, for `Tokenizer.from_directory`. files: with the weights.
    has_only_head: whether the files have the matrix of tied embeddings under the name of the head.
    quantized_format: of its quantised weights, such as "GGUF Q4_1 and Q8_0"; None if they are not quantised.
    quantization: how the matrices of safetensors files are quantised.
    """

    name: str
    config: ModelConfig
    directory: Path
    eos_token_ids: tuple[int, ...]
    files: tuple[Path, ...]
    has_only_head: bool = False
    quantized_format: str | None = None
    is_built_in: bool = False
    quantization: QuantizationConfig | None = None

    def keeps_quantized(self, quantization: str | None) -> bool:
        """Return whether quantised weights stay quantised under a `quantization` of `EngineOptions`."""
        return quantization == "native" or (quantization is None and not self.is_built_in)

    def tensors(
        self, dtype: torch.dtype = torch.float32, quantization: str | None = "off"
    ) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Yield each weight with its Hugging Face name, in the dtype of the file.

        quantization: as in `EngineOptions`: whether quantised weights stay quantised, or are dequantised to `dtype`.

        The tensors are views of the mapped files (copy before writing), except those of quantised weights. Tensors that
        follow from the config (rotation tables, a tied `lm_head`) are left out.
        """
        for name, tensor in self._all_tensors(dtype, keeps_quantized=self.keeps_quantized(quantization)):
            if name == _HEAD and self.has_only_head:
                yield _EMBEDDING, tensor
            elif not self._is_redundant(name, tensor):
                yield name, tensor

    def _all_tensors(
        self, dtype: torch.dtype, *, keeps_quantized: bool
    ) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        if self.quantization is not None:
            yield from read_quantized(
                self.files, self.quantization, _open_safetensors, dtype=dtype, keeps_quantized=keeps_quantized
            )
            return
        for file in self.files:
            if file.suffix == ".gguf":
                yield from GgufFile(file).tensors(dtype, keeps_quantized=keeps_quantized)
            else:
                yield from read_safetensors(file)

    def _is_redundant(self, name: str, tensor: Tensor | QuantizedTensor) -> bool:
        if name.endswith("rotary_emb.inv_freq") or (self.config.tie_embeddings and name == _HEAD):
            return True
        if self.quantization is None or not name.endswith("_proj.bias"):
            return False
        # Packages that quantise give each matrix a bias, which is 0 where the model has none.
        assert isinstance(tensor, Tensor)
        has_bias = self.config.output_bias if name.endswith("o_proj.bias") else self.config.qkv_bias
        return (not has_bias or ".mlp." in name) and not tensor.any()


def find_checkpoint(model: str | Path, *, without_weights: bool = False) -> Checkpoint:
    """Find a model and check its files, without reading its weights.

    model: `smollm2` (built in, downloaded once), a directory in Hugging Face layout, a `.gguf` file, or a hub id such
        as `Qwen/Qwen2.5-0.5B-Instruct` (downloaded into the hub's cache; `HF_HUB_OFFLINE=1` uses the cache alone).
    without_weights: neither download nor require the weights of a hub id or directory.

    Raises CheckpointError if the model is missing or incomplete, UnsupportedModelError if this engine cannot run it.
    """
    source = find_source(model)
    match source.kind:
        case "built-in":
            return _open_gguf(default_model_file(), source.name, BUILT_IN_MODEL)
        case "hub":
            # The small files first: an unsupported model is refused before gigabytes are downloaded.
            directory = download_small_files(source.name)
            read_config(directory)
            if not without_weights:
                directory = download_weights(source.name)
            return _open_directory(directory, source.name, without_weights=without_weights)
    assert source.path is not None
    if source.kind == "gguf":
        return _open_gguf(source.path, source.name)
    return _open_directory(source.path, source.name, without_weights=without_weights)


def _open_gguf(path: Path, name: str, built_in: BuiltInModel | None = None) -> Checkpoint:
    file = GgufFile(path)
    directory = gguf_tokenizer(file, {} if built_in is None else built_in.generation_config)
    return Checkpoint(
        name,
        file.config,
        directory,
        _generation_ends(directory),
        (path,),
        quantized_format=file.quantized_format(),
        is_built_in=built_in is not None,
    )


def _open_directory(directory: Path, name: str, *, without_weights: bool) -> Checkpoint:
    raw, config = read_config(directory)
    files = () if without_weights else weight_files(directory)
    file_of = _check_names(files, directory)
    for warning in config_warnings(raw):
        log.warning("%s: %s", directory / "config.json", warning)
    quantization = quantization_config(raw)
    quantized = find_quantized(read_headers(files), quantization) if files and quantization is not None else {}
    if config.tie_embeddings and _EMBEDDING in file_of and (_HEAD in quantized or not _is_tied(file_of)):
        log.warning("%s: tie_word_embeddings is true, but %s differs: it is not tied", directory, _HEAD)
        config = replace(config, tie_embeddings=False)
    has_only_head = config.tie_embeddings and _HEAD in {*file_of, *quantized} and _EMBEDDING not in file_of
    prepared = directory_tokenizer(directory)
    # The end tokens of both tokenizer and generation config, as in vLLM: a chat model often names the end of a turn in
    # one and the end of a text in the other.
    ends = _generation_ends(directory) or _eos_token_ids(raw, directory / "config.json")
    eos_token_ids = tuple(dict.fromkeys((*_tokenizer_eos(prepared), *ends)))
    return Checkpoint(
        name,
        config,
        prepared,
        eos_token_ids,
        files,
        has_only_head,
        quantized_format=None if quantization is None else quantization.describe(),
        quantization=quantization,
    )


def _check_names(files: tuple[Path, ...], directory: Path) -> dict[str, Path]:
    """Return the file of each tensor, from the headers alone, which also tell whether a file is complete."""
    found: dict[str, Path] = {}
    for file in files:
        with _open_safetensors(file) as tensors:
            names = tensors.keys()
        for name in names:
            if name in found:
                raise CheckpointError(
                    f"{directory} has the tensor {name} in both {found[name].name} and {file.name}: download it again"
                )
            found[name] = file
    if len(files) > 1:
        for name, shard in read_json(directory / INDEX)["weight_map"].items():
            if name not in found or found[name].name != shard:
                raise CheckpointError(f"{directory / shard} lacks {name}, which {INDEX} lists: download it again")
    return found


def _is_tied(file_of: Mapping[str, Path]) -> bool:
    """Return whether there is one matrix, or embedding and head are equal, as in files that hold it twice."""
    if _HEAD not in file_of:
        return True
    with _open_safetensors(file_of[_EMBEDDING]) as one, _open_safetensors(file_of[_HEAD]) as other:
        embedding, head = one.get_slice(_EMBEDDING), other.get_slice(_HEAD)
        if embedding.get_shape() != head.get_shape():
            return False
        rows = range(0, embedding.get_shape()[0], _COMPARED_ROWS)
        return all(
            bool((embedding[row : row + _COMPARED_ROWS] == head[row : row + _COMPARED_ROWS]).all()) for row in rows
        )


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        with contextlib.suppress(OSError), file.open("rb") as start:
            if start.read(24).startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{file} is only a Git LFS pointer: run `git lfs pull`") from None
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}): download it again") from error


def read_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a file with its name. Raises CheckpointError if the file is incomplete."""
    with _open_safetensors(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
            yield name, tensors.get_tensor(name)


def _eos_token_ids(raw: Mapping[str, Any], source: Path) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"{source} has eos_token_id {value!r}, which is neither a number nor a list of them")
    return tuple(dict.fromkeys(ids))


def _generation_ends(directory: Path) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    return _eos_token_ids(read_json(path), path)


def _tokenizer_eos(directory: Path) -> tuple[int, ...]:
    text = token_text(read_json(directory / "tokenizer_config.json").get("eos_token"))
    token = None if text is None else added_token_id(directory, text)
    if token is None:
        token = Tokenizer.from_directory(directory).eos_token_id
    return () if token is None else (token,)
