"""The models on this machine's disk: list, download and remove them. Imports no torch.

They are in the `models` directory of the cache (built-in models, and GGUF files or directories that users put there)
and in the cache of Hugging Face's hub.
"""

import contextlib
import difflib
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from dispec.engine.errors import CheckpointError
from dispec.engine.loading import default_model
from dispec.engine.loading.default_model import DEFAULT_DRAFT, DEFAULT_MODEL, LOCK, BuiltInModel
from dispec.engine.loading.model_source import (
    DRAFT_FILE,
    download_small_files,
    download_weights,
    find_source,
    read_config,
    weight_files,
)
from dispec.engine.loading.quantization_config import quantization_config
from dispec.engine.loading.quantized_layout import read_headers
from dispec.engine.machine.cache_directory import cache_directory
from dispec.layers.config import ModelConfig, UnsupportedModelError

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, HFCacheInfo

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # of safetensors, under torch's names


@dataclass(frozen=True)
class ModelFacts:
    """What the files of a model tell.

    weights: their format in words. problem: why the model cannot run, alone if there is one.
    """

    architecture: str = ""
    num_parameters: int = 0
    weights: str = ""
    problem: str = ""


@dataclass(frozen=True)
class CachedModel:
    """A model on disk.

    name: as `--model` takes it. path: of the directory or file. size: in bytes.
    last_used: seconds since the epoch; file systems update it once a day or never.
    """

    name: str
    path: Path
    size: int
    last_used: float
    facts: ModelFacts


def cached_models() -> Iterator[CachedModel]:
    """Yield the built-in models, other models in the cache directory, and those of the hub's cache."""
    cache = cache_directory()
    built_in: set[Path] = set()
    for model in built_in_models().values():
        files = model.files(cache)
        path = files[0] if len(files) == 1 else files[0].parent
        if model.is_in(cache):
            built_in.add(path)
            yield _local(model.name, path)
    with contextlib.suppress(OSError):
        for path in sorted((cache / "models").iterdir()):
            if path not in built_in and (path.suffix == ".gguf" or path.is_dir()):
                yield _local(str(path), path)
    for repository in sorted(_hub_repositories(), key=lambda one: str(one.repo_id)):
        revisions = sorted(repository.revisions, key=lambda one: ("main" in one.refs, one.last_modified))
        directory = revisions[-1].snapshot_path
        facts = model_facts(directory)
        yield CachedModel(repository.repo_id, directory, repository.size_on_disk, repository.last_accessed, facts)


def built_in_models() -> dict[str, BuiltInModel]:
    """Return the built-in models by name."""
    return {DEFAULT_MODEL: default_model.BUILT_IN_MODEL, DEFAULT_DRAFT: default_model.BUILT_IN_DRAFT}


def model_facts(path: Path) -> ModelFacts:
    """Read config and format of a model, of a directory or a GGUF file."""
    try:
        if path.is_file():
            from dispec.engine.loading.gguf_header import GgufHeader  # the gguf package takes 0.1 s

            header = GgufHeader(path)
            return _facts(header.config, header.quantized_format() or "GGUF, not quantised")
        raw, config = read_config(path)
        quantized = quantization_config(raw)
        headers = read_headers(weight_files(path))
        if quantized is not None:
            return _facts(config, quantized.describe())
        dtypes = dict.fromkeys(_DTYPES.get(header.dtype, header.dtype) for header in headers.values())
        if not (path / DRAFT_FILE).is_file():
            return _facts(config, ", ".join(dtypes))
        num_parameters = sum(math.prod(header.shape) for header in headers.values())
        return ModelFacts(config.architecture, num_parameters, f"{', '.join(dtypes)}, without embedding and head")
    except UnsupportedModelError as error:
        return ModelFacts(problem=f"unsupported: {_without(path, error)}")
    except CheckpointError as error:
        return ModelFacts(problem=f"incomplete: {_without(path, error)}")


def _facts(config: ModelConfig, weights: str) -> ModelFacts:
    return ModelFacts(config.architecture, config.num_parameters, weights)


def weights_on_disk(model: str) -> str | None:
    """Return the format of a model's files in words, such as "GGUF Q4_1 and Q8_0"; None if they are not on disk."""
    try:
        source = find_source(model)
    except CheckpointError:
        return None
    found = {one.name: one for one in cached_models()} if source.path is None else {}
    if source.path is None:
        return found[model].facts.weights or None if model in found else None
    return model_facts(source.path).weights or None


def pull(name: str) -> CachedModel:
    """Download a built-in model or a hub id and return it; an unsupported model before its weights.

    Raises CheckpointError for other names, without network, and for a download that failed; UnsupportedModelError if
    this engine cannot run the model.
    """
    built_in = built_in_models()
    if name in built_in:
        built_in[name].fetch()
    elif find_source(name, built_in).kind == "hub":
        read_config(download_small_files(name))
        weight_files(download_weights(name))
    else:
        raise CheckpointError(
            f"{name} is on this machine: only built-in models and hub ids (owner/name) are downloaded"
        )
    return find_cached(name)


def find_cached(name: str) -> CachedModel:
    """Return a model of `cached_models`. Raises CheckpointError, with the most similar name, if there is none."""
    found = {model.name: model for model in cached_models()}
    if name in found:
        return found[name]
    similar = difflib.get_close_matches(name, found, 1)
    hint = f" (did you mean {similar[0]}?)" if similar else ""
    raise CheckpointError(f"{name} is not cached{hint}: `dispec models` lists what is")


def remove(model: CachedModel) -> int:
    """Delete a cached model and return the bytes that were freed. Raises OSError.

    Processes that have its files open keep them until they close them.
    """
    cache = cache_directory()
    if cache not in model.path.parents:
        scan = _scan_hub()
        assert scan is not None
        (repository,) = (one for one in _models_of(scan) if one.repo_id == model.name)
        # Of this repository alone: copies of a repository have its commit hashes.
        scan = replace(scan, repos=frozenset({repository}))
        strategy = scan.delete_revisions(*(revision.commit_hash for revision in repository.revisions))
        strategy.execute()
        return strategy.expected_freed_size
    with FileLock(cache / LOCK):  # which downloads hold
        if model.path.is_dir():
            shutil.rmtree(model.path)
        else:
            model.path.unlink()
    return model.size


def _local(name: str, path: Path) -> CachedModel:
    stats = [one.stat() for one in ([path] if path.is_file() else sorted(path.rglob("*")))]
    size, used = sum(stat.st_size for stat in stats), max((stat.st_atime for stat in stats), default=0.0)
    return CachedModel(name, path, size, used, model_facts(path))


def _hub_repositories() -> list["CachedRepoInfo"]:
    scan = _scan_hub()
    return [] if scan is None else _models_of(scan)


def _models_of(scan: "HFCacheInfo") -> list["CachedRepoInfo"]:
    return [one for one in scan.repos if one.repo_type == "model" and one.revisions]


def _scan_hub() -> "HFCacheInfo | None":
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, ValueError):  # ValueError: the path is a file
        return None


def _without(path: Path, error: Exception) -> str:
    """Return an error without the path of the model, which stands beside it."""
    text = " ".join(str(error).split())
    for beginning in (f"{path}: not supported: ", f"{path}: ", f"{path} "):
        text = text.removeprefix(beginning)
    return text
