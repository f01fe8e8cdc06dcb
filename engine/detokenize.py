"""Token ids to text while they arrive: each piece final, none late, all of them together the decoded whole."""

import codecs
import json
import re

from engine.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class IncrementalDetokenizer:
    """The text of one sequence as it grows.

    `add` returns what the token makes certain: text that no later token can change. What is held back is only the
    beginning of a character whose bytes are split over tokens. The pieces of `add` and `finish` together equal
    `tokenizer.decode` of all the ids. The cost per token does not depend on the length of the sequence.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._text: _ByteText | _WindowText = (
            _ByteText(tokenizer, hidden) if tokenizer.is_byte_level else _WindowText(tokenizer, hidden)
        )

    def add(self, token_id: int) -> str:
        """The new text that is certain, often one word, empty inside a character and for skipped tokens."""
        return self._text.add(token_id)

    def finish(self) -> str:
        """What was held back, with U+FFFD for bytes that never became a character. Nothing may be added after it."""
        return self._text.finish()


class _ByteText:
    """Byte-level vocabularies: the text is the UTF-8 of the concatenated bytes, which Python decodes in steps."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowText:
    """Any other vocabulary: decode the tokens since the last text but one, and return what is new.

    Decoders of SentencePiece vocabularies treat the first token apart (they strip its space), so the tokens of the
    last text stay in the window. A run of byte tokens (`<0xE2>`) is valid or invalid as a whole: it is certain when
    another token follows it.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        self._backend = tokenizer.backend
        self._hidden = hidden
        decoder = self._backend.decoder
        kinds = json.loads(decoder.__getstate__()) if decoder is not None else {}
        types = {part["type"] for part in kinds.get("decoders", [kinds]) if "type" in part}
        self._falls_back_to_bytes = "ByteFallback" in types
        self._joins_bytes = "ByteLevel" in types
        self._window: list[int] = []
        self._shown = ""  # the text of the part of the window that has been returned
        self._shown_tokens = 0

    def add(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._hidden:
            return ""
        self._window.append(token_id)
        if self._falls_back_to_bytes and _BYTE_TOKEN.fullmatch(token):
            return ""  # without decoding: the run may be long
        text = self._decode(self._window)
        if self._joins_bytes and text.endswith(_REPLACEMENT):
            return ""
        return self._return(text)

    def finish(self) -> str:
        return self._return(self._decode(self._window))

    def _return(self, text: str) -> str:
        new = text[len(self._shown) :]
        if new:
            self._window = self._window[self._shown_tokens :]
            self._shown_tokens = len(self._window)
            self._shown = self._decode(self._window)
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)
