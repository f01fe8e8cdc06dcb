"""Check whether a directory's `tokenizer.json` alone gives the token ids of transformers' `AutoTokenizer`.

Transformers 5 builds some classes anew from their vocabulary (`Qwen2Tokenizer`, `LlamaTokenizer`), and adds tokens that
only other files name. The check takes 50 ms, importing transformers four seconds.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from dispec.engine.json_file import read_json


class _Model(msgspec.Struct):
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool = False
    ignore_merges: bool = False


class _TokenizerJson(msgspec.Struct):
    """The small parts of the file: decoding skips vocabulary and merges."""

    added_tokens: list[dict[str, Any]] = []
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None
    model: _Model = msgspec.field(default_factory=_Model)


_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
_GENERIC_CLASSES = (None, "PreTrainedTokenizer", "TokenizersBackend")
# `Qwen2Tokenizer` splits words by this, and ignores the pattern in tokenizer.json.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_self_contained(directory: Path) -> bool:
    """Return whether `tokenizer.json` alone gives the ids of `AutoTokenizer`; False where that is not certain."""
    contents = _read(directory)
    if contents is None:
        return True  # loading it reports what is wrong
    config = read_json(directory / "tokenizer_config.json")
    model = read_json(directory / "config.json")
    try:
        return (
            "auto_map" not in config
            and _has_all_tokens(contents, config, directory)
            and _keeps_post_processor(contents, config)
            and _keeps_class(contents, config, model)
        )
    except (AttributeError, KeyError, TypeError, ValueError):  # an unknown shape
        return False


def added_token_id(directory: Path, text: str) -> int | None:
    """Return the id of an added token of `tokenizer.json`; None without one of that text."""
    contents = _read(directory)
    tokens = contents.added_tokens if contents is not None else []
    return next((token["id"] for token in tokens if token["content"] == text), None)


def _read(directory: Path) -> _TokenizerJson | None:
    try:
        return msgspec.json.decode((directory / "tokenizer.json").read_bytes(), type=_TokenizerJson)
    except (OSError, msgspec.MsgspecError):
        return None


def _has_all_tokens(contents: _TokenizerJson, config: Mapping[str, Any], directory: Path) -> bool:
    """Return whether each token that another file names is an added token of tokenizer.json, with the same flags."""
    added = {token["content"]: token for token in contents.added_tokens}
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        ours = added.get(token.get("content"))
        if ours is None or ours["id"] != int(number):
            return False
        if any(ours.get(flag) != token.get(flag, ours.get(flag)) for flag in _FLAGS):
            return False
    special_tokens_map = read_json(directory / "special_tokens_map.json")
    for key, value in special_tokens_map.items():
        if key.endswith("_token") and _texts(value) != _texts(config.get(key)):
            return False
    named = [value for key, value in config.items() if key.endswith("_token") and not isinstance(value, bool)]
    named += [file[key] for file in (config, special_tokens_map) for key in _TOKEN_LISTS if key in file]
    return _texts(named) | read_json(directory / "added_tokens.json").keys() <= added.keys()


def _texts(value: Any) -> set[str]:
    """Return the texts of a token, or of several, in any of the forms of these files."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        return _texts(value["content"]) if "content" in value else _texts(list(value.values()))
    return {text for item in value for text in _texts(item)} if isinstance(value, Iterable) else set()


def _keeps_post_processor(contents: _TokenizerJson, config: Mapping[str, Any]) -> bool:
    """Return whether the file's post-processor is used: `add_bos_token` and `add_eos_token` replace it."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return True
    if config.get("add_bos_token") or config.get("add_eos_token"):
        return False
    return not contents.post_processor or contents.post_processor.get("type") == "ByteLevel"


def _keeps_class(contents: _TokenizerJson, config: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer's class in transformers takes tokenizer.json as it is."""
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    name = name.removesuffix("Fast") if isinstance(name, str) else None
    family = model.get("model_type")
    if family in ("qwen2", "qwen3") and name in (*_GENERIC_CLASSES, "Qwen2Tokenizer"):
        is_generic = family == "qwen3" and name in ("PreTrainedTokenizer", "TokenizersBackend")
        return is_generic or _equals_qwen2(contents, config)
    if family == "llama" and name == "LlamaTokenizer":
        return _has_byte_level(contents.pre_tokenizer) or _has_byte_level(contents.decoder)
    return family == "llama" and name in _GENERIC_CLASSES


def _equals_qwen2(contents: _TokenizerJson, config: Mapping[str, Any]) -> bool:
    """Return whether `Qwen2Tokenizer`, which keeps only vocabulary, merges and added tokens, builds the same again."""
    splits = (contents.pre_tokenizer or {}).get("pretokenizers") or []
    return (
        [part.get("type") for part in splits] == ["Split", "ByteLevel"]
        and splits[0].get("pattern") == {"Regex": _QWEN_WORDS}
        and (splits[0].get("behavior"), splits[0].get("invert")) == ("Isolated", False)
        and (splits[1].get("add_prefix_space"), splits[1].get("use_regex")) == (False, False)
        and contents.normalizer == {"type": "NFC"}
        and (contents.decoder or {}).get("type") == "ByteLevel"
        and not any(msgspec.to_builtins(contents.model).values())
        and not config.get("add_prefix_space")
        # Its defaults, which it would add.
        and isinstance(config.get("eos_token"), str | dict)
        and any(token["content"] == "<|endoftext|>" and token["special"] for token in contents.added_tokens)
        and len(config.get("added_tokens_decoder") or contents.added_tokens) == len(contents.added_tokens)
    )


def _has_byte_level(part: Any) -> bool:
    if isinstance(part, dict):
        return part.get("type") == "ByteLevel" or any(_has_byte_level(value) for value in part.values())
    return isinstance(part, list) and any(_has_byte_level(item) for item in part)
