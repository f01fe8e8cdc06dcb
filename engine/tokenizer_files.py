"""Bring a checkpoint's tokenizer into the one form that the engine reads: `tokenizer.json` and a chat template.

Most checkpoints have it already. The others (GGUF files, old repositories) are converted once through transformers,
into the cache, so that later starts and the front process do without its four seconds of import.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.cache import cache_path
from engine.errors import CheckpointError
from engine.gguf_file import GgufFile

_CONVERSION = "1"  # part of the cache key: raise it when the conversion changes
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_CONVERTIBLE = ("tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")

# How each vocabulary expects text to be split before merging, by llama.cpp's name. Transformers knows the rules of
# some names, depending on its version, and takes GPT-2's for the rest, which costs tokens and quality in silence.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _BYTES]


_PRE_TOKENIZERS: Mapping[str, list[dict[str, Any]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}],
    "qwen2": _split(_WORDS % ""),
    "llama-bpe": _split(_WORDS % "{1,3}"),
}


def directory_tokenizer(directory: Path) -> Path:
    """The directory itself if it holds a tokenizer.json, else a cached conversion of what it holds."""
    if (directory / "tokenizer.json").is_file():
        return directory
    sources = [directory / name for name in _CONVERTIBLE if (directory / name).is_file()]
    if not any(path.name in ("tokenizer.model", "vocab.json") for path in sources):
        raise CheckpointError(
            f"{directory} has no tokenizer.json (nor tokenizer.model, nor vocab.json with merges.txt): "
            "copy the tokenizer files of the model next to its weights"
        )
    prepared = _cache_entry(directory.name, sources)
    if not prepared.is_dir():
        _convert(prepared, directory)
    return prepared


def gguf_tokenizer(file: GgufFile) -> Path:
    """A directory with the tokenizer and chat template that the GGUF file carries, converted the first time."""
    prepared = _cache_entry(file.path.stem, [file.path])
    if not prepared.is_dir():
        _convert(prepared, file.path.parent, file)
    return prepared


def _cache_entry(stem: str, sources: Iterable[Path]) -> Path:
    """A name that changes when a source does. Size and time stand for the contents: hashing gigabytes takes long."""
    digest = hashlib.sha256(_CONVERSION.encode())
    for path in sources:
        status = path.stat()
        digest.update(f"\0{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return cache_path("tokenizers", f"{stem}-{digest.hexdigest()[:16]}")


def _convert(prepared: Path, source: Path, file: GgufFile | None = None) -> None:
    from transformers import AutoTokenizer  # 4 s: only here

    try:
        prepared.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=prepared.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to the cache {prepared.parent}: {error.strerror}") from error
    options = {} if file is None else {"gguf_file": file.path.name}
    try:
        AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options).save_pretrained(unfinished)
        if not (unfinished / "tokenizer.json").is_file():
            raise ValueError("it has no fast form")
        if file is not None:
            _mend(unfinished, file)
        with contextlib.suppress(OSError):  # another process was first: its conversion is as good
            os.rename(unfinished, prepared)
    # Whatever transformers stumbles over (a broken file, a missing package, a new vocabulary) is reported alike.
    except Exception as error:
        what = source.name if file is None else file.path.name
        summary = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"the tokenizer of {what} could not be converted to tokenizer.json ({summary}): "
            "put a tokenizer.json into a Hugging Face model directory instead"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _mend(directory: Path, file: GgufFile) -> None:
    """Put right what the conversion takes from its own defaults rather than from the file."""
    path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
    contents = json.loads(path.read_text(encoding="utf-8"))
    if (rules := _PRE_TOKENIZERS.get(file.pre_tokenizer or "")) is not None:
        contents["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": rules}
    if file.pre_tokenizer == "llama-bpe":
        contents["model"]["ignore_merges"] = True  # a word that is a token needs no merges to reach it
    tokens = {token: text for text, token in contents["model"]["vocab"].items()}
    tokens |= {added["id"]: added["content"] for added in contents["added_tokens"]}
    named = {role: tokens[token] for role, token in file.special_token_ids.items() if token in tokens}
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in _ROLES} | named
    contents["post_processor"] = (
        _begin_with(named["bos_token"], file) if file.adds_bos and "bos_token" in named else None
    )
    path.write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
    config_path.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")


def _begin_with(bos: str, file: GgufFile) -> dict[str, Any]:
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
    special = {bos: {"id": bos, "ids": [file.special_token_ids["bos_token"]], "tokens": [bos]}}
    single, pair = [start, text], [start, text, second]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
