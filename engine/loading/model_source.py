"""Find the files of a model by its name, and check those that need no torch: the config and the list of weights.

The server checks a model before it starts a process, the engine before it opens the weights.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dispec.engine.errors import CheckpointError
from dispec.engine.json_file import read_json
from dispec.engine.loading.default_model import DEFAULT_DRAFT, DEFAULT_MODEL
from dispec.engine.loading.quantization_config import quantization_config, refuse_second_quantization
from dispec.engine.loading.quantized_layout import find_quantized, read_headers
from dispec.layers.config import ModelConfig, UnsupportedModelError, config_from_hugging_face

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SPECULATIVE_MODELS = (DEFAULT_MODEL, DEFAULT_DRAFT, "ngram")  # names that are no path or hub id
DRAFT_FILE = "draft.json"  # marks a draft model that shares its target's embedding and head

_CONFIG = "config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
_HUB_WEIGHTS = [WEIGHTS, "model-*.safetensors"]  # without the copies in other layouts that some repositories have
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")  # as the hub's client reads its variables
_MAX_DIRECTORY_ENTRIES = 1000  # read for a suggestion
_MIN_SIMILARITY = 0.7  # of a suggested name: "smollm2-135m" and "smollm2" have 0.74


@dataclass(frozen=True)
class ModelSource:
    """The place of a model. path: of the directory or file; None for the built-in model and hub ids."""

    kind: Literal["built-in", "directory", "gguf", "hub"]
    name: str
    path: Path | None = None


def find_source(model: str | Path, known: Iterable[str] = (DEFAULT_MODEL,)) -> ModelSource:
    """Find the source of a named model, without network. known: names to suggest for a misspelt one.

    Raises CheckpointError if there is no such model.
    """
    if model == DEFAULT_MODEL:
        return ModelSource("built-in", DEFAULT_MODEL)
    try:
        str(model).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"model is {str(model)!r}, must be UTF-8 text") from None
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelSource("directory", path.resolve().name, path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is not a .gguf file: give the directory that holds config.json")
        return ModelSource("gguf", path.stem, path)
    if isinstance(model, str) and _HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return ModelSource("hub", model)
    raise CheckpointError(
        f"there is no model at {path}{_suggestion(model, known)}: give a directory, a .gguf file, a hub id (owner/name)"
        f" or {DEFAULT_MODEL!r}"
    )


def check_model(model: str | Path, *, without_weights: bool = False, quantization: str | None = None) -> None:
    """Check that a model exists, is supported and has all files, as far as its small files tell.

    Downloads the small files of a hub id that is not in the cache. quantization: the option of this name. Raises the
    errors of `find_checkpoint`, ValueError if the model cannot be quantised so.
    """
    source = find_source(model)
    if source.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source.name, _CONFIG)
        directory = Path(cached).parent if isinstance(cached, str) else download_small_files(source.name)
        raw, _ = read_config(directory)
        refuse_second_quantization(quantization, quantization_config(raw))
    elif source.kind == "directory":
        assert source.path is not None
        raw, _ = read_config(source.path)
        quantized = quantization_config(raw)
        refuse_second_quantization(quantization, quantized)
        if not without_weights:
            files = weight_files(source.path)
            if quantized is not None:
                find_quantized(read_headers(files), quantized)


def check_draft(model: str | Path, *, without_weights: bool = False) -> None:
    """Check a `speculative_model` as `check_model` does."""
    if model not in ("ngram", DEFAULT_DRAFT) and not (Path(model).expanduser() / DRAFT_FILE).is_file():
        find_source(model, SPECULATIVE_MODELS)
        check_model(model, without_weights=without_weights)


def download_small_files(model: str) -> Path:
    """Download all files of a hub id but the weights. Raises CheckpointError."""
    return _download(model, _HUB_SMALL_FILES)


def download_weights(model: str) -> Path:
    """Download the weights of a hub id beside its small files. Raises CheckpointError."""
    return _download(model, _HUB_WEIGHTS)


def _download(model: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"the hub grants {model} on request only: accept its terms on its page, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model} is neither a local directory nor a model on the hub{_suggestion(model)}: check the spelling, "
            "or log in with `hf auth login` if it is private"
        ) from error
    except LocalEntryNotFoundError as error:
        offline = next((name for name in _OFFLINE_VARIABLES if os.environ.get(name, "").upper() in _TRUE), None)
        why = "the hub cannot be reached: connect" if offline is None else f"{offline} is set: unset it"
        raise CheckpointError(
            f"{model} is not in the local cache and {why}, or give a directory{_suggestion(model)}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: an id that the hub does not accept
        summary = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{model} could not be downloaded from the hub ({summary}): try again") from error


def _suggestion(model: str | Path, known: Iterable[str] = (DEFAULT_MODEL,)) -> str:
    """Return the most similar name that exists, as a question in brackets; nothing if none is similar enough."""
    path = Path(model).expanduser()
    names = {name.lower(): name for name in (*known, *hub_ids_in_cache())}
    neighbours = {name.lower(): str(path.parent / name) for name in models_in(path.parent)}
    for wanted, candidates in ((str(model), names), (path.name, neighbours)):
        for match in difflib.get_close_matches(wanted.lower(), candidates, n=1, cutoff=_MIN_SIMILARITY):
            return f" (did you mean {candidates[match]}?)"
    return ""


def models_in(directory: Path) -> Iterator[str]:
    """Yield the names of model directories and GGUF files in a directory."""
    try:
        with os.scandir(directory) as entries:
            for entry in islice(entries, _MAX_DIRECTORY_ENTRIES):
                if entry.name.endswith(".gguf") or os.path.isfile(os.path.join(entry.path, _CONFIG)):
                    yield entry.name
    except OSError:
        return


def hub_ids_in_cache() -> Iterator[str]:
    """Yield the ids of models of which the hub's cache has files."""
    from huggingface_hub import constants

    try:
        for name in os.listdir(constants.HF_HUB_CACHE):
            kind, _, rest = name.partition("--")
            if kind == "models" and rest:
                yield rest.replace("--", "/", 1)
    except OSError:
        return


def read_config(directory: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Return the contents of config.json, raw and parsed.

    Raises CheckpointError if it is missing or invalid, UnsupportedModelError if the engine cannot run the model.
    """
    path = directory / _CONFIG
    if not path.is_file():
        ggufs = sorted(directory.glob("*.gguf"))
        advice = f"give the file {ggufs[0]}" if ggufs else "give the directory that holds config.json and the weights"
        raise CheckpointError(f"{directory} has no config.json: {advice}")
    raw = read_json(path)
    return raw, _parse_config(raw, directory)


def _parse_config(raw: Mapping[str, Any], directory: Path) -> ModelConfig:
    try:
        quantization_config(raw)
        return config_from_hugging_face(raw)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{directory}: not supported: {error}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        reason = str(error).removeprefix("config.json: ")
        raise CheckpointError(f"{directory / _CONFIG} is invalid ({reason}): download it again") from error


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a directory. Raises CheckpointError if one is missing."""
    if (directory / WEIGHTS).is_file():
        return (directory / WEIGHTS,)
    index = directory / INDEX
    if not index.is_file():
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
            raise CheckpointError(
                f"{directory} has only pickled PyTorch weights, which can run code when loaded: "
                "convert them to safetensors"
            )
        raise CheckpointError(f"{directory} has neither {WEIGHTS} nor {INDEX}: finish its download")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: download it again")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard!r}, which is not a file next to it: download it again")
        if not (directory / shard).is_file():
            raise CheckpointError(f"{directory / shard} is missing, but {INDEX} names it: finish the download")
    return tuple(directory / shard for shard in shards)
