"""Provide a checkpoint's tokenizer in the form that the engine reads: `tokenizer.json` and a chat template.

Most checkpoints have it. GGUF files are converted by llama.cpp's rules, other directories through transformers, once
and into the cache: later starts and the server process avoid the four seconds of its import.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from dispec.engine.errors import CheckpointError
from dispec.engine.loading.gguf_file import GgufFile
from dispec.engine.loading.gguf_tokenizer import GgufTokenizer
from dispec.engine.loading.tokenizer_check import is_self_contained
from dispec.engine.machine.cache_directory import cache_path

_CONVERSION_VERSION = "2"  # part of the cache key: raise it when the conversion changes
_SOURCES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "config.json", "generation_config.json"),
)


def directory_tokenizer(directory: Path) -> Path:
    """Return the directory itself if its tokenizer.json equals `AutoTokenizer`, else a cached conversion.

    Raises CheckpointError without tokenizer files, or if they cannot be converted.
    """
    if (directory / "tokenizer.json").is_file() and is_self_contained(directory):
        return directory
    sources = [directory / name for name in _SOURCES if (directory / name).is_file()]
    if not any(path.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for path in sources):
        raise CheckpointError(
            f"{directory} has no tokenizer.json (nor tokenizer.model, nor vocab.json with merges.txt): "
            "copy the tokenizer files of the model next to its weights"
        )
    prepared = _cache_entry(directory.name, sources, importlib.metadata.version("transformers"))
    if not prepared.is_dir():
        _convert(prepared, directory.name, lambda target: _through_transformers(directory, target))
    return prepared


def gguf_tokenizer(file: GgufFile, generation_config: Mapping[str, float] | None = None) -> Path:
    """Return a cached directory with the tokenizer and chat template of a GGUF file. Raises CheckpointError.

    generation_config: sampling parameters that its `generation_config.json` gets.
    """
    stated = dict(generation_config or {})
    prepared = _cache_entry(file.path.stem, [file.path], json.dumps(stated) if stated else "")
    if not prepared.is_dir():
        _convert(prepared, file.path.name, lambda target: GgufTokenizer(file.tokenizer_metadata()).save(target, stated))
    return prepared


def _cache_entry(stem: str, sources: Iterable[Path], version: str = "") -> Path:
    """Return a path that changes when a source does, by size and time: hashing gigabytes of weights takes too long."""
    digest = hashlib.sha256(f"{_CONVERSION_VERSION} {version}".encode())
    for path in sources:
        status = path.stat()
        digest.update(f"\0{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return cache_path("tokenizers", f"{stem}-{digest.hexdigest()[:16]}")


def _through_transformers(directory: Path, target: Path) -> None:
    from transformers import AutoTokenizer  # 4 s: only here

    AutoTokenizer.from_pretrained(directory, trust_remote_code=False).save_pretrained(target)
    if not (target / "tokenizer.json").is_file():
        raise ValueError("it has no fast form")
    if (generation := directory / "generation_config.json").is_file():  # it is read beside the tokenizer
        shutil.copy(generation, target)


def _convert(prepared: Path, name: str, convert_into: Callable[[Path], None]) -> None:
    try:
        prepared.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=prepared.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to the cache {prepared.parent}: {error.strerror}") from error
    try:
        convert_into(unfinished)
        with contextlib.suppress(OSError):  # another process was first, with the same result
            os.rename(unfinished, prepared)
    except Exception as error:  # a broken file, a missing package, a new kind of vocabulary
        summary = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"the tokenizer of {name} could not be converted to tokenizer.json ({summary}): "
            "put a tokenizer.json into a Hugging Face model directory instead"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
