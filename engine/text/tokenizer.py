"""Text to token ids and back, from a `tokenizer.json`. Without torch or transformers: the front process uses it."""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dispec.engine.errors import CheckpointError
from dispec.engine.json_file import read_json
from dispec.engine.text.chat_messages import plain_messages
from dispec.engine.text.chat_template import ChatTemplate
from dispec.engine.text.special_texts import ChatText, SpecialTexts

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The printable character by which GPT-2's byte-level vocabularies spell each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Safe to share between threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """`config` is the contents of tokenizer_config.json, as `/tokenizer_info` shows it."""
        # A file may carry the padding and truncation of its training run; prompts are never cut or padded.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.config = dict(config or {})
        self._chat_template = ChatTemplate(chat_templates, self.special_tokens) if chat_templates else None
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        self.special_ids = frozenset(token for text in special if (token := backend.token_to_id(text)) is not None)
        decoder = backend.decoder
        self.decoder_kinds = frozenset(_kinds(json.loads(decoder.__getstate__())) if decoder is not None else ())
        self._bytes: dict[int, bytes] = {}
        self._special_texts = SpecialTexts(backend)

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Tokenizer":
        """Read `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`.

        Raises CheckpointError if the first is missing or one is broken; the others are optional.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{directory} has no tokenizer.json: copy the model's tokenizer files there")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # it raises plain Exception
            raise CheckpointError(f"{path} is not a tokenizer that we can read ({error}): download it again") from error
        config = read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(read_json(directory / "special_tokens_map.json") | config)
        return cls(backend, special_tokens, _chat_templates(directory, config), config)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. `add_special_tokens` adds what the model expects around a text (often a BOS token);
        leave it off for the output of a chat template, which has them already. Special tokens spelled out in the text
        become those tokens. Raises ValueError for a text with half a surrogate pair.
        """
        _check_unicode(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def bad_word_token_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of texts that shall not be generated, at the start of a word and within one.

        Of white space, such as a newline, exactly what is given.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            _check_unicode(word)
            bare = word.lstrip(" ")
            for text in (bare, " " + bare) if bare.strip() else (word,):
                if ids := tuple(self._inside.encode(text, add_special_tokens=False).ids):
                    found[ids] = None
        return tuple(found)

    @functools.cached_property
    def _inside(self) -> tokenizers.Tokenizer:
        """The same, for texts that stand within another: without the space that some put before a text."""
        contents = json.loads(self.backend.to_str())
        parts = {name: _without_first_space(contents[name]) for name in ("normalizer", "pre_tokenizer")}
        if all(contents[name] == part for name, part in parts.items()):
            return self.backend
        return tokenizers.Tokenizer.from_str(json.dumps(contents | parts))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Bytes that are not UTF-8 become U+FFFD; ids past the vocabulary are nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation; encode it with `add_special_tokens=False`. See `ChatTemplate.render`.

        Raises ValueError if the checkpoint has no chat template, or naming the field that is wrong.
        """
        if self._chat_template is None:
            raise ValueError("the model has no chat template: send it a plain prompt, as to /v1/completions")
        return self._chat_template.render(messages, add_generation_prompt, tools, continue_final_message, **variables)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> ChatText:
        """The prompt of a conversation, for `encode_chat`. Raises as `apply_chat_template`."""
        plain, texts = plain_messages(messages), self._special_texts
        mark = texts.find_mark(plain, tools, variables)
        if mark is not None:
            plain, tools, variables = (texts.interrupt(value, mark) for value in (plain, tools, variables))
        text = self.apply_chat_template(plain, add_generation_prompt, tools, continue_final_message, **variables)
        return ChatText(text, text, None) if mark is None else texts.text(text, mark)

    def encode_chat(self, text: ChatText, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered conversation. Special tokens that its messages spell out are text, not tokens.

        Raises ValueError for a text with half a surrogate pair.
        """
        _check_unicode(text.plain)
        if text.mark is not None:
            return self._special_texts.encode(text.marked, text.mark, add_special_tokens)
        # `encode` holds Python's lock for as long as it takes; this does not.
        return self.backend.encode_batch_fast([text.plain], add_special_tokens=add_special_tokens)[0].ids

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def template_variables(self) -> frozenset[str]:
        """See `ChatTemplate.variables`; none without a template."""
        return frozenset() if self._chat_template is None else self._chat_template.variables

    @property
    def vocab_size(self) -> int:
        """Number of tokens with the added ones. The model's own vocabulary may be padded to more."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token's id, added ones included."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        """The source of the template for conversations without tools, if there is one."""
        return None if self._chat_template is None else self._chat_template.source

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.backend.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.backend.token_to_id(self.eos_token)

    @property
    def is_byte_level(self) -> bool:
        """Whether tokens are pieces of bytes that simply follow one another, so that a text is their concatenation."""
        return self.decoder_kinds == {"ByteLevel"}

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token; None for what is none."""
        return self.backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def byte_of(self, token_id: int) -> int | None:
        """The byte of a token such as `<0xE2>`, where the vocabulary falls back to bytes; None for other tokens."""
        if "ByteFallback" not in self.decoder_kinds:
            return None
        match = _BYTE_TOKEN.fullmatch(self.id_to_token(token_id) or "")
        return int(match[1], 16) if match else None

    def token_string(self, token_id: int) -> str:
        """Return how the vocabulary writes a token: `Ġthe` or `▁the` for ` the`. Empty for unknown ids."""
        return self.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """What one token spells within a text, perhaps a part of a character; nothing for unknown ids.

        At the beginning of a text SentencePiece vocabularies leave out the space that the token begins with.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        if not self.is_byte_level:
            if self.id_to_token(token_id) is None:
                return b""
            if (byte := self.byte_of(token_id)) is not None:
                return bytes([byte])
            # Decoders treat the first token apart, so that it is the second which shows what it is.
            once, twice = (self.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
            return twice[len(once) :].encode()
        text = self.id_to_token(token_id) or ""
        spelled = [_BYTE_OF.get(character) for character in text]
        # Added tokens may be written plainly: one character outside the alphabet, and the token means itself.
        return text.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)


def _check_unicode(text: str) -> None:
    """Raise ValueError for half a surrogate pair, as Python makes of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise ValueError(f"text holds {found!r} at position {error.start}, must be valid Unicode") from None


def _kinds(part: Any) -> set[str]:
    """The types of a decoder's parts, a `Sequence` itself left out."""
    kinds = set() if part.get("type") in (None, "Sequence") else {part["type"]}
    return kinds.union(*(_kinds(inner) for inner in part.get("decoders", [])))


def _without_first_space(part: Any) -> Any:
    """A normalizer or pre-tokenizer, as JSON, that puts nothing before a text."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    changed = dict(part)
    if part.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    elif part.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            changed[name] = [left for inner in part[name] if (left := _without_first_space(inner)) is not None]
    return changed


def token_text(token: Any) -> str | None:
    """The text of a token as the config files write it: a string, or an object with a `content`, in older files."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens by role."""
    found = {role: token for role in _SPECIAL_TOKENS if (token := token_text(config.get(role))) is not None}
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    names: Iterable[Any] = more if isinstance(more, list) else []
    return found | {"additional_special_tokens": [token for name in names if (token := token_text(name)) is not None]}


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; the file `chat_template.jinja` comes before the older place inside the config."""
    stated = config.get("chat_template") or {}
    if isinstance(stated, list):
        stated = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
    elif isinstance(stated, str):
        stated = {"default": stated}
    if not isinstance(stated, dict) or not all(isinstance(part, str) for pair in stated.items() for part in pair):
        raise CheckpointError(f"{directory / 'tokenizer_config.json'}: chat_template is not a template")
    files = {path.stem: path for path in directory.glob("additional_chat_templates/*.jinja")}
    files["default"] = directory / "chat_template.jinja"
    return stated | {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
