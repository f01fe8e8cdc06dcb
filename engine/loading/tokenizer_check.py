"""Whether a directory's `tokenizer.json` says all that transformers' `AutoTokenizer` makes of the tokenizer files.

Transformers 5 builds some classes anew from their vocabulary (`Qwen2Tokenizer`, `LlamaTokenizer`), and adds tokens that
stand only in other files. This check takes some 50 ms where importing transformers takes four seconds.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from dispec.engine.json_file import read_json

_AddedToken = dict[str, Any]


class _Model(msgspec.Struct):
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool = False
    ignore_merges: bool = False


class _TokenizerJson(msgspec.Struct):
    """The parts of the file that are small."""

    added_tokens: list[_AddedToken] = []
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None
    model: _Model = msgspec.field(default_factory=_Model)


_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
# What `Qwen2Tokenizer` splits words by; tokenizer.json is not asked.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_whole(directory: Path) -> bool:
    """Whether `tokenizer.json` alone gives the ids of `AutoTokenizer`; False where that is not certain."""
    contents = _read(directory)
    if contents is None:
        return True  # reading it will tell what is wrong
    config = read_json(directory / "tokenizer_config.json")
    model = read_json(directory / "config.json")
    try:
        return (
            "auto_map" not in config
            and _holds_the_tokens(contents, config, directory)
            and _adds_what_is_asked(contents, config)
            and _is_taken_as_it_is(contents, config, model)
        )
    except (AttributeError, KeyError, TypeError, ValueError):  # of a shape that we do not know
        return False


def added_token_id(directory: Path, text: str) -> int | None:
    """The id of an added token of `tokenizer.json`; None if there is none of that text."""
    contents = _read(directory)
    tokens = contents.added_tokens if contents is not None else []
    return next((token["id"] for token in tokens if token["content"] == text), None)


def _read(directory: Path) -> _TokenizerJson | None:
    try:
        return msgspec.json.decode((directory / "tokenizer.json").read_bytes(), type=_TokenizerJson)
    except (OSError, msgspec.MsgspecError):
        return None


def _holds_the_tokens(contents: _TokenizerJson, config: Mapping[str, Any], directory: Path) -> bool:
    """Whether every token that another file names is an added token of tokenizer.json."""
    held = {token["content"]: token for token in contents.added_tokens}
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        ours = held.get(token.get("content"))
        if ours is None or ours["id"] != int(number):
            return False
        if any(ours.get(flag) != token.get(flag, ours.get(flag)) for flag in _FLAGS):
            return False
    older = read_json(directory / "special_tokens_map.json")
    if any(_texts(value) != _texts(config.get(key)) for key, value in older.items() if key.endswith("_token")):
        return False
    named = [value for key, value in config.items() if key.endswith("_token") and not isinstance(value, bool)]
    named += [files[key] for files in (config, older) for key in _MORE_TOKENS if key in files]
    texts = {text for value in named for text in _texts(value)} | read_json(directory / "added_tokens.json").keys()
    return texts <= held.keys()


_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")


def _texts(value: Any) -> set[str]:
    """The texts of a token, or of several, in any of the forms that they are written in."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        return _texts(value["content"]) if "content" in value else _texts(list(value.values()))
    return {text for item in value for text in _texts(item)} if isinstance(value, Iterable) else set()


def _adds_what_is_asked(contents: _TokenizerJson, config: Mapping[str, Any]) -> bool:
    """Whether the file's own additions around a text stand: `add_bos_token` and `add_eos_token` replace them."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return True
    if config.get("add_bos_token") or config.get("add_eos_token"):
        return False
    return not contents.post_processor or contents.post_processor.get("type") == "ByteLevel"


def _is_taken_as_it_is(contents: _TokenizerJson, config: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    name = name.removesuffix("Fast") if isinstance(name, str) else None
    family = model.get("model_type")
    if family in ("qwen2", "qwen3") and name in (None, "Qwen2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend"):
        if _is_that_of_qwen(contents, config):
            return True
        return family == "qwen3" and name in ("PreTrainedTokenizer", "TokenizersBackend")
    if family == "llama" and name == "LlamaTokenizer":
        return _is_byte_level(contents.pre_tokenizer) or _is_byte_level(contents.decoder)
    return family == "llama" and name in (None, "PreTrainedTokenizer", "TokenizersBackend")


def _is_that_of_qwen(contents: _TokenizerJson, config: Mapping[str, Any]) -> bool:
    """Whether `Qwen2Tokenizer`, which keeps only vocabulary, merges and additions, builds the same again."""
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
        # Its own defaults, which it would add.
        and isinstance(config.get("eos_token"), str | dict)
        and any(token["content"] == "<|endoftext|>" and token["special"] for token in contents.added_tokens)
        and len(config.get("added_tokens_decoder") or contents.added_tokens) == len(contents.added_tokens)
    )


def _is_byte_level(part: Any) -> bool:
    if isinstance(part, dict):
        return part.get("type") == "ByteLevel" or any(_is_byte_level(value) for value in part.values())
    return isinstance(part, list) and any(_is_byte_level(item) for item in part)
