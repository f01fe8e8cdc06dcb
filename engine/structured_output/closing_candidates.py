"""Tokens that a search for the end of an output tries first."""

from collections.abc import Iterable, Sequence

import numpy as np
from llguidance import LLTokenizer

# Costs are in tokens, roughly. Bytes that close something come first, bytes that only lengthen a text come last.
_CLOSING_COST, _USUAL_COST, _LETTER_COST, _OTHER_COST, _PADDING_COST = 0.75, 1.0, 1.25, 1.5, 2.0
_REST_COST = 10.0  # more for the bytes that stand for others, such as most letters of a text
_CLOSING = b"]})"
_USUAL = b"0,:"
_PUNCTUATION = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_SAMPLES = _PUNCTUATION + b"01aA \n\xc3\xe2\xf0\x80\x90\xa0\xbf"  # tried first in a text that allows many bytes
# What patterns of texts often ask, such as `^\\S+@\\S+\\.\\S+$`, in which no mask shows that "@" leads on.
_FORMATS = (b"a@a.aa", b"@a.aa", b".aa", b"@a.com", b".com", b"http://a.aa")
# Groups of bytes that mostly lead to the same state. Of a group with more allowed bytes than these, samples come first.
_MAX_OF_GROUP = 8
_DIGITS = frozenset(b"0123456789")
_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_HEX_LETTERS = frozenset(b"abcdefABCDEF")
_WIDE = frozenset(range(0x80, 0x100))
_NUM_BYTES_OF_TEXT = 64  # a state that allows more bytes is within a text
_MAX_SPECIAL = 8
_MAX_OTHERS = 32

# White space, what begins an escape sequence, and the parts of longer characters.
_UNUSUAL = frozenset([*range(0x21), ord("\\"), *range(0x7F, 0x100)])


def _byte_cost(byte: int, is_quoted: bool) -> float:
    if byte == ord('"') or (byte in _CLOSING and not is_quoted):
        return _CLOSING_COST
    if byte == ord("1") if is_quoted else byte in _USUAL:  # 1111-11-11T11:11:11Z is a date, 0000-00-00 is not
        return _USUAL_COST
    if byte in _UNUSUAL:
        return _PADDING_COST
    return _LETTER_COST if chr(byte).isalnum() else _OTHER_COST


_COSTS = [_byte_cost(byte, is_quoted=False) for byte in range(256)]
_QUOTED_COSTS = [_byte_cost(byte, is_quoted=True) for byte in range(256)]

Candidate = tuple[float, tuple[int, ...]]


class KnownPlan:
    """A plan of which a tail may complete another state.

    num_bytes: of the whole text. Only tails that start within the first `max_bytes` are used.
    """

    def __init__(self, candidates: "ClosingCandidates", tokens: Sequence[int], max_bytes: int) -> None:
        self._candidates = candidates
        self._tokens = tokens
        self._starts: list[tuple[int, int]] = []  # the token and the byte in it at which each tail starts
        self._offsets: dict[int, list[int]] = {}
        self._tails: dict[int, list[int]] = {}
        for i, token in enumerate(tokens):
            text = candidates.text([token])
            if not text or len(self._starts) >= max_bytes:
                break
            for j, byte in enumerate(text):
                self._offsets.setdefault(byte, []).append(len(self._starts))
                self._starts.append((i, j))

    def offsets(self) -> Iterable[tuple[int, Sequence[int]]]:
        """Return for each byte where tails start with it, in bytes from the start of the plan."""
        return self._offsets.items()

    def tail(self, offset: int) -> list[int]:
        """Return the tokens from a byte on. The first of them may be a part of a token."""
        if offset not in self._tails:
            i, j = self._starts[offset]
            part = self._candidates.tokenize(self._candidates.text(self._tokens[i : i + 1])[j:]) if j else []
            self._tails[offset] = part + list(self._tokens[i + bool(j) :])
        return self._tails[offset]

    def __len__(self) -> int:
        return len(self._starts)


class ClosingCandidates:
    """The single bytes, repeated bytes and special tokens of a vocabulary. Made once for each tokenizer: 0.1 s.

    vocab_size: of the logits.
    """

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int) -> None:
        self.eos = tokenizer.eos_token
        self._tokenizer = tokenizer
        self._texts: list[bytes] = []
        self._special: list[int] = []
        byte_tokens: dict[int, int] = {}
        runs: dict[bytes, list[int]] = {}
        for token in range(min(tokenizer.vocab_size, vocab_size)):
            text = b"" if tokenizer.is_special_token(token) else tokenizer.decode_bytes([token])
            self._texts.append(text)
            if not text and token not in tokenizer.eos_tokens:
                self._special.append(token)
            elif len(text) == 1:
                byte_tokens[text[0]] = token  # the last one: SentencePiece's tokens of bytes come before its characters
            elif len(text) > 3 and text.count(text[:1]) == len(text):
                runs.setdefault(text[:1], []).append(token)
        self._byte_tokens = byte_tokens
        self._bytes = sorted(byte_tokens)
        ids = np.array([byte_tokens[byte] for byte in self._bytes], np.int64)
        self._words, self._bits = ids // 8, (1 << (ids % 8)).astype(np.uint8)
        self._formats = [tuple(self.tokenize(text)) for text in _FORMATS]
        self._runs = {byte: sorted(ids, key=lambda i: -len(self._texts[i])) for byte, ids in runs.items()}

    def edges(self, mask: bytes, is_quoted: bool) -> tuple[list[Candidate], list[Candidate]]:
        """Return the tokens to try in a state with this mask, and those to try only after them, with their costs."""
        allowed = np.frombuffer(mask, np.uint8)[self._words] & self._bits
        found = [self._bytes[i] for i in allowed.nonzero()[0].tolist()]
        is_text = len(found) > _NUM_BYTES_OF_TEXT
        # A text or a list that a quote or a bracket may close needs nothing more: other bytes come later.
        closing = [ord('"')] if is_quoted else [] if is_text else list(_CLOSING)
        closing = [byte for byte in closing if byte in found]
        has_usual = any(byte not in _UNUSUAL for byte in found)
        letters = _LETTERS.intersection(found)
        is_hex = is_quoted and letters <= _HEX_LETTERS and _DIGITS.issubset(found)
        groups = (_DIGITS, _WIDE, _LETTERS) if is_quoted and (is_text or is_hex) else (_DIGITS, _WIDE)
        grouped = {byte for group in groups if len(group.intersection(found)) > _MAX_OF_GROUP for byte in group}
        costs = _QUOTED_COSTS if is_quoted else _COSTS
        first: list[Candidate] = []
        rest: list[Candidate] = []
        for byte in found:
            cost = costs[byte]
            is_first = byte in closing if closing else not (has_usual and byte in _UNUSUAL)
            if byte in grouped and byte not in _SAMPLES:
                cost += _REST_COST if byte < 0x80 else 4 * _REST_COST
                is_first = False
            (first if is_first else rest).append((cost, (self._byte_tokens[byte],)))
        if is_text and is_quoted and not closing:
            first.extend((_OTHER_COST, tokens) for tokens in self._formats)
        if len(found) < 2 or is_text:
            first.extend((_OTHER_COST, (token,)) for token in self._allowed_special(mask))
        if not first and not rest:
            first = [(_OTHER_COST, (token,)) for token in self._others(mask)]
        rest.sort()
        return first, rest

    def allows(self, mask: bytes, byte: int) -> bool:
        """Return whether the token of a byte is allowed."""
        token = self._byte_tokens.get(byte)
        return token is not None and bool(mask[token >> 3] >> (token & 7) & 1)

    def longest_run(self, tokens: Sequence[int], mask: bytes) -> int | None:
        """Return the longest allowed token that repeats the byte of a single-byte token."""
        runs = self._runs.get(self.text(tokens)[:1], ()) if len(tokens) == 1 else ()
        return next((token for token in runs if mask[token >> 3] >> (token & 7) & 1), None)

    def is_text(self, mask: bytes) -> bool:
        """Return whether a state with this mask is within a text: it allows many bytes."""
        allowed = np.frombuffer(mask, np.uint8)[self._words] & self._bits
        return bool(np.count_nonzero(allowed) > _NUM_BYTES_OF_TEXT)

    def text(self, tokens: Sequence[int]) -> bytes:
        """Return the text of tokens that are not special."""
        return b"".join(self._texts[token] for token in tokens)

    def bytewise(self, tokens: Sequence[int]) -> list[int]:
        """Return the same text with one token for each byte, where the vocabulary has it."""
        split: list[int] = []
        for token in tokens:
            text = self._texts[token]
            single = [self._byte_tokens.get(byte, -1) for byte in text]
            split.extend([token] if not text or -1 in single else single)
        return split

    def tokenize(self, text: bytes) -> list[int]:
        """Return few tokens with exactly this text, none of them special; none if the vocabulary lacks a byte."""
        ways = [self._tokenizer.tokenize_bytes(text)]
        if text.isascii():
            ways.append(self._tokenizer.greedy_tokenize(text.decode()))
        ways = [tokens for tokens in ways if self.text(tokens) == text]
        if not ways and all(byte in self._byte_tokens for byte in text):
            ways.append([self._byte_tokens[byte] for byte in text])
        return min(ways, key=len, default=[])

    def compact(self, tokens: Sequence[int]) -> list[int]:
        """Return few tokens with the text of these. Special tokens stay."""
        compact: list[int] = []
        start = 0
        for end in [i for i, token in enumerate(tokens) if not self._texts[token]] + [len(tokens)]:
            part = list(tokens[start:end])
            again = self.tokenize(self.text(part)) if len(part) > 1 else part
            compact += again if len(again) < len(part) and self.text(again) == self.text(part) else part
            compact += tokens[end : end + 1]
            start = end + 1
        return compact

    def _allowed_special(self, mask: bytes) -> list[int]:
        return [token for token in self._special if mask[token >> 3] >> (token & 7) & 1][:_MAX_SPECIAL]

    def _others(self, mask: bytes) -> list[int]:
        """The shortest allowed token of each first byte: for vocabularies that lack tokens of single bytes."""
        shortest: dict[bytes, int] = {}
        for token in np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").nonzero()[0].tolist():
            if token >= len(self._texts) or not self._texts[token]:
                continue
            first = self._texts[token][:1]
            if first not in shortest or len(self._texts[token]) < len(self._texts[shortest[first]]):
                shortest[first] = token
        return list(shortest.values())[:_MAX_OTHERS]
