"""The tokenizer of a GGUF file as Hugging Face files, by llama.cpp's rules for its `gpt2` and `llama` vocabularies."""

import json
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import tokenizers

from dispec.engine.loading.llama_cpp_rules import (
    ADD_BOS,
    END_TOKENS,
    FIM_END_KEYS,
    FIM_TOKENS,
    IGNORE_MERGES,
    VISIBLE_TOKENS,
    word_patterns,
)

_GGML = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SENTENCEPIECE_ROLES = {"unk_token": 0, "bos_token": 1, "eos_token": 2}  # of a `llama` vocabulary that names none


class _TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_SPECIAL = (_TokenType.UNKNOWN, _TokenType.CONTROL)
_ADDED = (*_SPECIAL, _TokenType.USER_DEFINED)


class GgufTokenizer:
    """The tokenizer that the `tokenizer.*` entries of a GGUF file describe.

    Raises ValueError, with the reason, for entries that llama.cpp refuses and vocabularies without a Hugging Face
    equivalent.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self._is_sentencepiece = self._get("model") == "llama"
        if self._get("model") not in ("gpt2", "llama"):
            raise ValueError(f"the vocabulary is {self._get('model')!r}, must be gpt2 or llama")
        if not (tokens := self._get("tokens", [])):
            raise ValueError("it has no tokens")
        self.tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(tokens)]
        self.ids = {text: index for index, text in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            repeated = next(text for index, text in enumerate(self.tokens) if self.ids[text] != index)
            raise ValueError(f"two tokens are {repeated!r}")
        self._fim_ids = {
            key: self.ids[text]
            for key, texts in FIM_TOKENS.items()
            if self._id(key) is None and (text := next(filter(self.ids.__contains__, texts), None))
        }
        self.end_ids = self._find_end_ids()
        self.types = self._find_types()
        defaults = _SENTENCEPIECE_ROLES if self._is_sentencepiece else {}
        self.roles = {role: self._id(key, defaults.get(role)) for role, key in _ROLES.items()}

    def save(self, directory: Path, generation_config: Mapping[str, Any] | None = None) -> None:
        """Write `tokenizer.json`, its config, the chat templates, and `generation_config.json` with the end tokens."""
        contents = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": token, "content": self.tokens[token], "special": kind in _SPECIAL, "normalized": False}
                | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
                for token, kind in enumerate(self.types)
                if kind in _ADDED
            ],
            "post_processor": self._post_processor(),
        } | (self._sentencepiece() if self._is_sentencepiece else self._byte_level())
        text = json.dumps(contents, ensure_ascii=False)
        tokenizers.Tokenizer.from_str(text)  # raises an exception with the reason if the parts do not fit together
        (directory / "tokenizer.json").write_text(text, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        named = {role: self.tokens[token] for role, token in self.roles.items() if token is not None}
        _write_json(directory / "tokenizer_config.json", config | named)
        _write_json(
            directory / "generation_config.json", {"eos_token_id": self.end_ids} | dict(generation_config or {})
        )
        self._save_templates(directory)

    def _get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(_GGML + key, default)

    def _id(self, key: str, default: int | None = None) -> int | None:
        """Return the token with a role; the default if none is named or the vocabulary does not have it."""
        token = self._get(f"{key}_token_id")
        found = default if token is None or not 0 <= token < len(self.tokens) else int(token)
        return None if found is None or found >= len(self.tokens) else found

    def _find_end_ids(self) -> list[int]:
        found = [self._id("eos", 2 if self._is_sentencepiece else None), self._id("eot"), self._id("eom")]
        found += [self._id(key, self._fim_ids.get(key)) for key in FIM_END_KEYS]
        found += sorted(token for text, token in self.ids.items() if text in END_TOKENS)
        ends = list(dict.fromkeys(token for token in found if token is not None))
        texts = {self.tokens[token] for token in ends}
        not_ends = set()
        # GPT-OSS ends a message with `<|end|>`, not its answer.
        if {"<|return|>", "<|call|>"} <= texts or {"<|flush|>", "<|calls|>"} <= texts:
            not_ends.add("<|end|>")
        if "<|tool_response>" in texts:
            not_ends.add("</s>")
        return [token for token in ends if self.tokens[token] not in not_ends]

    def _find_types(self) -> list[int]:
        given = self._get("token_type")
        types = [_TokenType.NORMAL] * len(self.tokens) if given is None else list(given)
        if len(types) < len(self.tokens):
            raise ValueError(f"it has {len(self.tokens)} tokens but {len(types)} token types")
        for token in (*self._fim_ids.values(), *(self.ids[text] for text in END_TOKENS & self.ids.keys())):
            types[token] = _TokenType.CONTROL
        for text in VISIBLE_TOKENS & self.ids.keys():
            types[self.ids[text]] = _TokenType.USER_DEFINED
        for text, kind in (("<|end|>", _TokenType.USER_DEFINED), ("</s>", _TokenType.NORMAL)):
            if text in self.ids and self.ids[text] not in self.end_ids:
                types[self.ids[text]] = kind
        return types

    def _byte_level(self) -> dict[str, Any]:
        pairs = [pair.split(" ", 1) if pair[:1] != " " else [" ", pair[2:]] for pair in self._get("merges", [])]
        if not pairs:
            raise ValueError("it has no merges")
        name = self._get("pre") or "default"
        splits = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in word_patterns(name)
        ]
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        # Unused ids have no text: most only pad the vocabulary to a round number.
        merged = {part for pair in pairs for part in pair} | {"".join(pair) for pair in pairs}
        vocabulary = {
            text: token for text, token in self.ids.items() if self.types[token] != _TokenType.UNUSED or text in merged
        }
        return {
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, to_bytes]},
            "decoder": to_bytes,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": pairs, "ignore_merges": name in IGNORE_MERGES},
        }

    def _sentencepiece(self) -> dict[str, Any]:
        normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if self._get("add_space_prefix", True):  # to each text between two special tokens
            normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        unknown = self.roles["unk_token"]
        return {
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "vocab": self.ids,
                "merges": self._merges_by_score(),
                "unk_token": None if unknown is None else self.tokens[unknown],
                "fuse_unk": True,
                "byte_fallback": True,
            },
        }

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """Return each pair of tokens that makes a token, in falling order of the made token's score."""
        scores: Sequence[float] = self._get("scores") or [0.0] * len(self.tokens)
        if len(scores) < len(self.tokens):
            raise ValueError(f"it has {len(self.tokens)} tokens but {len(scores)} scores")
        found = [
            (-float(scores[token]), -cut, text[:cut], text[cut:])
            for token, text in enumerate(self.tokens)
            if self.types[token] in (_TokenType.NORMAL, _TokenType.UNUSED)
            for cut in range(1, len(text))
            if text[:cut] in self.ids and text[cut:] in self.ids
        ]
        found.sort(key=lambda merge: merge[:2])
        return [(left, right) for _, _, left, right in found]

    def _post_processor(self) -> dict[str, Any] | None:
        adds_bos = self._get("add_bos_token", self._is_sentencepiece or self._get("pre") in ADD_BOS)
        first = self.roles["bos_token"] if adds_bos else None
        last = self.roles["eos_token"] if self._get("add_eos_token", False) else None
        if first is None and last is None:
            return None
        names = {self.tokens[token]: token for token in (first, last) if token is not None}
        before, after = (
            [] if token is None else [{"SpecialToken": {"id": self.tokens[token], "type_id": 0}}]
            for token in (first, last)
        )
        text, second = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
        return {
            "type": "TemplateProcessing",
            "single": [*before, text, *after],
            "pair": [*before, text, second, *after],
            "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in names.items()},
        }

    def _save_templates(self, directory: Path) -> None:
        for key, template in self._metadata.items():
            name = key.removeprefix(_TEMPLATE + ".")
            if key == _TEMPLATE:
                (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
            elif name != key and name.replace("-", "_").isidentifier():
                more = directory / "additional_chat_templates"
                more.mkdir(exist_ok=True)
                (more / f"{name}.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, ensure_ascii=False, indent=2), encoding="utf-8")
