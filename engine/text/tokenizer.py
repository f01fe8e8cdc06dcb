"""Text to token ids and back, from a `tokenizer.json`. Loads no torch, because the server's process uses it."""

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
from dispec.engine.text.special_token_marker import ChatText, SpecialTokenMarker

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each printable character in GPT-2's byte-level vocabularies."""
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
        """`config`: the contents of tokenizer_config.json, for `/tokenizer_info`."""
        # A file may have the padding and truncation of its training run.
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
        self._special_token_marker = SpecialTokenMarker(backend)

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
        """Return the token ids of a text, with special tokens for those that it spells out.

        `add_special_tokens` adds those that the model expects around a text (often BOS), which the output of a chat
        template has already. Raises ValueError for half a surrogate pair.
        """
        _check_unicode(text)
        # `backend.encode` would hold Python's lock, and note the offset of each token.
        return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def bad_word_token_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of texts that are not to be generated, with and without a space before each.

        White space, such as a newline, is taken as it is.
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
        """The backend for texts within another text, before which it puts no space."""
        contents = json.loads(self.backend.to_str())
        parts = {name: _without_first_space(contents[name]) for name in ("normalizer", "pre_tokenizer")}
        if all(contents[name] == part for name, part in parts.items()):
            return self.backend
        return tokenizers.Tokenizer.from_str(json.dumps(contents | parts))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Bytes that are not UTF-8 become U+FFFD; unknown ids have no text."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Return the prompt of a conversation, to be encoded without `add_special_tokens`. See `ChatTemplate.render`.

        Raises ValueError without a chat template, InvalidField for a wrong message.
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
        """Return the prompt of a conversation for `encode_chat`. Raises as `apply_chat_template`."""
        plain, marker = plain_messages(messages), self._special_token_marker
        mark = marker.find_mark(plain, tools, variables)
        if mark is not None:
            plain, tools, variables = (marker.add_marks(value, mark) for value in (plain, tools, variables))
        text = self.apply_chat_template(plain, add_generation_prompt, tools, continue_final_message, **variables)
        return ChatText(text, text, None) if mark is None else marker.chat_text(text, mark)

    def encode_chat(self, text: ChatText, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a rendered conversation, with plain text for special tokens that messages spell out.

        Raises ValueError for half a surrogate pair.
        """
        if text.mark is None:
            return self.encode(text.plain, add_special_tokens)
        _check_unicode(text.plain)
        return self._special_token_marker.encode(text.marked, text.mark, add_special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def template_variables(self) -> frozenset[str]:
        """Those of `ChatTemplate.variables`; none without a template."""
        return frozenset() if self._chat_template is None else self._chat_template.variables

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included. The model's vocabulary may be padded to more."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token, added ones included."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        """The source of the template for conversations without tools; None without one."""
        return None if self._chat_template is None else self._chat_template.source

    @property
    def tool_chat_template(self) -> str | None:
        """The source of the template for conversations with tools; None without one."""
        return None if self._chat_template is None else self._chat_template.tool_source

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of_role("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of_role("eos_token")

    def _id_of_role(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def is_byte_level(self) -> bool:
        """Whether a text is the concatenation of its tokens' bytes."""
        return self.decoder_kinds == {"ByteLevel"}

    def id_to_token(self, token_id: int) -> str | None:
        """Return the vocabulary's spelling of a token (`Ġthe` or `▁the` for ` the`); None for unknown ids."""
        return self.backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def byte_of(self, token_id: int) -> int | None:
        """Return the byte of a byte-fallback token such as `<0xE2>`; None for other tokens."""
        if "ByteFallback" not in self.decoder_kinds:
            return None
        match = _BYTE_TOKEN.fullmatch(self.id_to_token(token_id) or "")
        return int(match[1], 16) if match else None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 of a token within a text, perhaps a part of a character; empty for unknown ids.

        At the beginning of a text SentencePiece vocabularies drop the token's first space.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        if not self.is_byte_level:
            if self.id_to_token(token_id) is None:
                return b""
            if (byte := self.byte_of(token_id)) is not None:
                return bytes([byte])
            # Decoders treat the first token of a text differently: the second one adds the token's own text.
            once, twice = (self.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
            return twice[len(once) :].encode()
        text = self.id_to_token(token_id) or ""
        spelled = [_BYTE_OF.get(character) for character in text]
        # An added token with a character outside the alphabet is plain text.
        return text.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)


def _check_unicode(text: str) -> None:
    """Raise ValueError for half a surrogate pair, into which Python decodes bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise ValueError(f"text holds {found!r} at position {error.start}, must be valid Unicode") from None


def _kinds(part: Any) -> set[str]:
    """Return the types of a decoder's parts, without `Sequence` itself."""
    kinds = set() if part.get("type") in (None, "Sequence") else {part["type"]}
    return kinds.union(*(_kinds(inner) for inner in part.get("decoders", [])))


def _without_first_space(part: Any) -> Any:
    """Return a normalizer or pre-tokenizer, as JSON, without the space that it puts before a text."""
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
    """Return the text of a token in a config file: a string, or an object with a `content` in older files."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokens by role."""
    found = {role: token for role in _SPECIAL_TOKENS if (token := token_text(config.get(role))) is not None}
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    names: Iterable[Any] = more if isinstance(more, list) else []
    return found | {"additional_special_tokens": [token for name in names if (token := token_text(name)) is not None]}


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return templates by name. Files replace those inside the config."""
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
