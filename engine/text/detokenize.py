"""Token ids to text while they arrive: each piece final, none late, all of them together the decoded whole."""

import codecs
from collections.abc import Sequence

from dispec.engine.text.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_BEGINNING = 16  # tokens; a character without its last byte is three, and special tokens may stand between


class IncrementalDetokenizer:
    """The text of one sequence as it grows, after a prompt.

    The prompt gives no text itself, but a text that goes on after it differs from one that begins: SentencePiece
    vocabularies have no space at the beginning, and a prompt may end within a character.

    `add` returns what the token makes certain: text that no later token can change. What is held back is only the
    beginning of a character whose bytes are split over tokens. The pieces of `add` and `finish` together equal what
    `tokenizer.decode` of prompt and ids adds to that of the prompt. The cost per token does not depend on the length
    of the sequence.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        kind = _ByteText if tokenizer.is_byte_level else _WindowText
        self._text: _ByteText | _WindowText = kind(tokenizer, hidden, prompt_token_ids)

    def add(self, token_id: int) -> str:
        """The new text that is certain, often one word, empty inside a character and for skipped tokens."""
        return self._text.add(token_id)

    def finish(self) -> str:
        """What was held back, with U+FFFD for bytes that never became a character. Nothing may be added after it."""
        return self._text.finish()


class _ByteText:
    """Byte-level vocabularies: the text is the UTF-8 of the concatenated bytes, which Python decodes in steps."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_untouched = False  # the decoder as the prompt left it, perhaps within a character
        for token in prompt_token_ids[-_LONGEST_BEGINNING:]:
            self.add(token)
        self._is_untouched = True

    def add(self, token_id: int) -> str:
        if token_id in self._hidden or not (spelled := self._tokenizer.token_bytes(token_id)):
            return ""
        if self._is_untouched and not _goes_on(spelled[0]):
            self._decoder.reset()
        self._is_untouched = False
        return self._decoder.decode(spelled)

    def finish(self) -> str:
        return "" if self._is_untouched else self._decoder.decode(b"", final=True)


class _WindowText:
    """Any other vocabulary: decode the tokens since the last text but one, and return what is new.

    Decoders of SentencePiece vocabularies treat the first token apart (they strip its space), so the tokens of the
    last text stay in the window. A run of byte tokens (`<0xE2>`) is valid or invalid as a whole: it is certain when
    another token follows it.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend
        self._hidden = hidden
        self._joins_bytes = "ByteLevel" in tokenizer.decoder_kinds
        before, self._begun = self._end_of(prompt_token_ids)
        self._window = list(before)
        self._shown = self._decode(before)  # the text of the part of the window that has been returned
        self._shown_tokens = len(before)

    def add(self, token_id: int) -> str:
        if self._is_nothing(token_id):
            return ""
        byte = self._tokenizer.byte_of(token_id)
        if self._begun:
            if byte is not None and _goes_on(byte):
                self._window += self._begun
            self._begun = []
        self._window.append(token_id)
        if byte is not None:
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

    def _end_of(self, token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """What of a prompt the text after it depends on: its last token with a text, and a character begun in bytes."""
        run: list[int] = []
        before: list[int] = []
        for token in reversed(token_ids):
            if self._is_nothing(token):
                continue
            if self._tokenizer.byte_of(token) is None:
                before = [token]
                break
            run.append(token)
        run.reverse()
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(bytes(byte for token in run if (byte := self._tokenizer.byte_of(token)) is not None))
        num_begun = len(decoder.getstate()[0])
        whole, begun = run[: len(run) - num_begun], run[len(run) - num_begun :]
        # Bytes that follow one another are decoded as one, so that whole characters must not stand before a begun one.
        return before or (whole if not begun else []), begun

    def _is_nothing(self, token_id: int) -> bool:
        return token_id in self._hidden or self._tokenizer.id_to_token(token_id) is None

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def _goes_on(byte: int) -> bool:
    """Whether it is a byte of a character that an earlier one begins."""
    return byte & 0xC0 == 0x80
