"""Small vocabularies of the kinds that tokenizer files have, and published ones."""

import json
import shutil
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from dispec.engine.text.tokenizer import Tokenizer
from tests.checkpoints import tiny_tokenizer
from tests.real_tokenizers import tokenizer_directory


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
# Real tokenizers, and the type of their model.
PUBLISHED = {"llama2": "llama", "qwen3": "qwen3"}


def published_tokenizer(name: str, tmp_path: Path) -> Path:
    """Return a directory with the files of a real tokenizer and a `config.json`."""
    directory = tmp_path / "model"
    shutil.copytree(tokenizer_directory(name), directory)
    (directory / "config.json").write_text(json.dumps({"model_type": PUBLISHED[name]}))
    return directory
