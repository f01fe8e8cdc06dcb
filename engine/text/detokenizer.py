"""Incremental detokenisation: the text of a sequence while its tokens are generated.

`tokenizers.DecodeStream` fails where `tests/test_detokenizer.py` says: it raises an exception for byte tokens that form
no character, repeats the text of a prompt that ends within a character, never returns invalid bytes, and decodes
a run of them again with each token (300 µs a token after 4,000 of them, against 0.3 µs here).
"""

import codecs
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from dispec.engine.text.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_SPLIT_TOKENS = 16  # most tokens of a prompt's last character: three, and special tokens between them


class IncrementalDetokenizer(ABC):
    """The text of one sequence that continues a prompt.

    Joined, the pieces that `add` and `finish` return are the text by which `tokenizer.decode` of prompt and output is
    longer than that of the prompt. Each piece is final, and comes with the token that makes it certain: only the
    beginning of a character that is split over tokens is held back. The cost of a token does not depend on the length
    of the sequence.
    """

    @abstractmethod
    def add(self, token_id: int) -> str:
        """Return the text that the token completes: empty within a character and for special tokens to be skipped."""

    @abstractmethod
    def finish(self) -> str:
        """Return the text held back, with U+FFFD for incomplete characters. Nothing may be added afterwards."""


def make_detokenizer(
    tokenizer: Tokenizer,
    skip_special_tokens: bool = True,
    prompt_token_ids: Sequence[int] = (),
    kept_token_ids: frozenset[int] = frozenset(),
) -> IncrementalDetokenizer:
    """Return the detokenizer of a sequence. kept_token_ids: special tokens that are not skipped.

    The prompt's text is not returned, and yet changes the text after it: a prompt may end within a character, and
    SentencePiece vocabularies drop the space at the beginning of a text.
    """
    skipped = tokenizer.special_ids - kept_token_ids if skip_special_tokens else frozenset()
    kind = _ByteLevelDetokenizer if tokenizer.is_byte_level else _WindowDetokenizer
    return kind(tokenizer, skipped, prompt_token_ids)


class _ByteLevelDetokenizer(IncrementalDetokenizer):
    """For byte-level vocabularies: the text is the UTF-8 of the tokens' bytes."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._has_output = True
        for token in prompt_token_ids[-_MAX_SPLIT_TOKENS:]:
            self.add(token)
        self._has_output = False  # the decoder may hold the beginning of a character of the prompt

    def add(self, token_id: int) -> str:
        if token_id in self._skipped or not (spelled := self._tokenizer.token_bytes(token_id)):
            return ""
        if not self._has_output:
            self._has_output = True
            if not _is_continuation(spelled[0]):
                self._decoder.reset()
        return self._decoder.decode(spelled)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True) if self._has_output else ""


class _WindowDetokenizer(IncrementalDetokenizer):
    """For all other vocabularies: decodes the tokens from the last ones with a text on, and returns the difference.

    SentencePiece decoders strip the space of the first token, so that a token with a text stays before the new ones. A
    run of byte tokens (`<0xE2>`) is valid or invalid as a whole, so that its text comes with the token after it.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._joins_bytes = "ByteLevel" in tokenizer.decoder_kinds
        self._window, self._begun = self._end_of(prompt_token_ids)
        self._num_returned = len(self._window)  # tokens of the window with their text returned already
        self._returned = self._decode(self._window)

    def add(self, token_id: int) -> str:
        if self._has_no_text(token_id):
            return ""
        byte = self._tokenizer.byte_of(token_id)
        if self._begun:
            if byte is not None and _is_continuation(byte):
                self._window += self._begun
            self._begun = []
        self._window.append(token_id)
        if byte is not None:
            return ""  # undecoded, because the run may be long
        text = self._decode(self._window)
        return "" if self._joins_bytes and text.endswith(_REPLACEMENT) else self._return(text)

    def finish(self) -> str:
        return self._return(self._decode(self._window))

    def _return(self, text: str) -> str:
        new = text[len(self._returned) :]
        if new:
            self._window = self._window[self._num_returned :]
            self._num_returned = len(self._window)
            self._returned = self._decode(self._window)
        return new

    def _end_of(self, prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt that its continuation depends on.

        They are a last token with a text, and the byte tokens of a character that the prompt leaves incomplete.
        """
        run: deque[int] = deque()
        last: list[int] = []
        for token in reversed(prompt):
            if self._has_no_text(token):
                continue
            if self._tokenizer.byte_of(token) is None:
                last = [token]
                break
            run.appendleft(token)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(b"".join(map(self._tokenizer.token_bytes, run)))
        split = len(run) - len(decoder.getstate()[0])
        whole, begun = list(run)[:split], list(run)[split:]
        # A run is decoded as one: complete characters may not stand before the incomplete one.
        return last or ([] if begun else whole), begun

    def _has_no_text(self, token_id: int) -> bool:
        return token_id in self._skipped or self._tokenizer.id_to_token(token_id) is None

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.backend.decode(ids, skip_special_tokens=False)


def _is_continuation(byte: int) -> bool:
    """Return whether a byte continues a UTF-8 character."""
    return byte & 0xC0 == 0x80
