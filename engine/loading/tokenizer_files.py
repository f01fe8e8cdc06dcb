"""Bring a checkpoint's tokenizer into the one form that the engine reads: `tokenizer.json` and a chat template.

Most checkpoints have it already. GGUF files are converted by llama.cpp's rules, other directories through transformers,
each once and into the cache, so that later starts and the front process do without its four seconds of import.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from dispec.engine.errors import CheckpointError
from dispec.engine.loading.gguf_file import GgufFile
from dispec.engine.loading.gguf_tokenizer import GgufTokenizer
from dispec.engine.loading.tokenizer_check import is_whole
from dispec.engine.machine.cache_directory import cache_path

_CONVERSION = "2"  # part of the cache key: raise it when the conversion changes
_SOURCES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "config.json", "generation_config.json"),
)


def directory_tokenizer(directory: Path) -> Path:
    """The directory itself if its tokenizer.json is what `AutoTokenizer` makes of it, else a cached conversion."""
    if (directory / "tokenizer.json").is_file() and is_whole(directory):
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


def gguf_tokenizer(file: GgufFile) -> Path:
    """A directory with the tokenizer and chat template that the GGUF file carries, converted the first time."""
    prepared = _cache_entry(file.path.stem, [file.path])
    if not prepared.is_dir():
        _convert(prepared, file.path.name, lambda target: GgufTokenizer(file.tokenizer_metadata()).save(target))
    return prepared


def _cache_entry(stem: str, sources: Iterable[Path], version: str = "") -> Path:
    """A name that changes when a source does. Size and time stand for the contents: hashing gigabytes takes long."""
    digest = hashlib.sha256(f"{_CONVERSION} {version}".encode())
    for path in sources:
        status = path.stat()
        digest.update(f"\0{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return cache_path("tokenizers", f"{stem}-{digest.hexdigest()[:16]}")


def _through_transformers(directory: Path, target: Path) -> None:
    from transformers import AutoTokenizer  # 4 s: only here

    AutoTokenizer.from_pretrained(directory, trust_remote_code=False).save_pretrained(target)
    if not (target / "tokenizer.json").is_file():
        raise ValueError("it has no fast form")
    if (suggested := directory / "generation_config.json").is_file():  # sampling, which is read beside the tokenizer
        shutil.copy(suggested, target)


def _convert(prepared: Path, name: str, convert_into: Callable[[Path], None]) -> None:
    try:
        prepared.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=prepared.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to the cache {prepared.parent}: {error.strerror}") from error
    try:
        convert_into(unfinished)
        with contextlib.suppress(OSError):  # another process was first: its conversion is as good
            os.rename(unfinished, prepared)
    # Every failure of a conversion (a broken file, a missing package, a new vocabulary) is reported alike.
    except Exception as error:
        summary = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"the tokenizer of {name} could not be converted to tokenizer.json ({summary}): "
            "put a tokenizer.json into a Hugging Face model directory instead"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
