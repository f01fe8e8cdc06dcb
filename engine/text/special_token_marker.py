"""Special tokens that messages spell out, as plain text in the prompt, so that no content begins or ends a turn.

A mark is put inside each such text before the chat template sees it, and after a text that ends with the beginning of
one, which the template may complete. In the rendered prompt the special tokens without a mark are the template's own. A
copy of the tokenizer, in which they have secret names, encodes everything else as text. It splits the prompt where the
original does, so that prefix spaces and stripped white space stay the same.
"""

import re
import secrets
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import tokenizers

from dispec.engine.errors import InvalidField

# Some vocabularies do not call tokens special that begin turns, as DeepSeek's with fullwidth bars.
_CONTROL = re.compile("<[|\uff5c].*[|\uff5c]>", re.DOTALL)
_MARKS = range(0xE001, 0xF8FF)  # private-use characters, of which the first that no message has is the mark


class ChatText(NamedTuple):
    """A rendered conversation. `marked` has `mark` inside every special token that messages spell out."""

    plain: str
    marked: str
    mark: str | None


class SpecialTokenMarker:
    """Marks the texts of a tokenizer's special tokens, and encodes prompts with marks."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def find_mark(self, *values: Any) -> str | None:
        """Return a character that no string in the JSON values has.

        None if no string spells a special token or ends with the beginning of one.
        """
        texts = [text for value in values for text in _strings(value)]
        if self._pattern is None or not any(self._needs_mark(text) for text in texts):
            return None
        used = set().union(*texts)
        mark = next((mark for mark in map(chr, _MARKS) if mark not in used), None)
        if mark is None:
            raise InvalidField("messages", "messages hold every private-use character, must leave one for marks")
        return mark

    def add_marks(self, value: Any, mark: str) -> Any:
        """Return a copy of a JSON value with `mark` inside every special token that its strings spell out."""
        if isinstance(value, Mapping):
            return {self.add_marks(key, mark): self.add_marks(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.add_marks(item, mark) for item in value]
        if not isinstance(value, str) or self._pattern is None:
            return value
        while self._pattern.search(value) is not None:  # the rest of one token may spell another
            value = self._pattern.sub(lambda found: f"{found[0][0]}{mark}{found[0][1:]}", value)
        return value + mark if self._ends_with_beginning(value) else value

    def chat_text(self, marked: str, mark: str) -> ChatText:
        """Return a prompt that was rendered from values with marks, without marks if they make no difference."""
        assert self._pattern is not None
        plain = marked.replace(mark, "")
        parts = [part.replace(mark, "") for part in self._pattern.split(marked)]
        if parts == self._pattern.split(plain) and self._num_normalized(plain) in (None, len(parts) - 1):
            return ChatText(plain, plain, None)
        return ChatText(plain, marked, mark)

    def encode(self, marked: str, mark: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text in which the special tokens without a mark are tokens, and the others text.

        Raises InvalidField if the vocabulary has no other way to write the text of a special token.
        """
        assert self._pattern is not None
        renamed = self._renamed
        text = renamed.rename(marked, self._pattern).replace(mark, "")
        ids = renamed.encode(text, add_special_tokens=False)
        if not renamed.is_faithful or not renamed.forbidden.isdisjoint(ids):
            raise InvalidField(
                "messages",
                "messages spell out a special token that this model's tokenizer cannot take for text: leave it out, or"
                " allow it with allow_special_tokens_in_content",
            )
        if add_special_tokens:
            ids = renamed.encode(text, add_special_tokens=True)
        return renamed.original_ids(ids)

    def _needs_mark(self, text: str) -> bool:
        assert self._pattern is not None
        return bool(self._pattern.search(text) or self._num_normalized(text)) or self._ends_with_beginning(text)

    def _num_normalized(self, text: str) -> int | None:
        """Return the number of special tokens in a normalized text; None if tokens are found before normalization."""
        normalizer = self._backend.normalizer
        if normalizer is None or self._normalized_pattern is None:
            return None
        return len(self._normalized_pattern.findall(normalizer.normalize_str(text)))

    def _ends_with_beginning(self, text: str) -> bool:
        """Return whether the text ends with the beginning of a special token."""
        end = text[-self._longest_beginning :]
        return any(end[index:] in self._beginnings for index in range(len(end)) if end[index] in self._beginnings)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(token.content[:end] for token in self._tokens for end in range(1, len(token.content)))

    @cached_property
    def _longest_beginning(self) -> int:
        return max(map(len, self._beginnings), default=1)

    @cached_property
    def _tokens(self) -> list[tokenizers.AddedToken]:
        tokens = [token for token in self._backend.get_added_tokens_decoder().values() if len(token.content) > 1]
        return [token for token in tokens if token.special or _CONTROL.fullmatch(token.content)]

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        return _any_of({token.content for token in self._tokens}) if self._tokens else None

    @cached_property
    def _normalized_pattern(self) -> re.Pattern[str] | None:
        if not any(token.normalized for token in self._tokens):
            return None
        texts = {token.content for token in self._tokens}
        return _any_of(texts | {self._backend.normalizer.normalize_str(text) for text in texts})

    @cached_property
    def _renamed(self) -> "_RenamedTokenizer":
        assert self._pattern is not None
        return _RenamedTokenizer(self._backend, self._tokens, self._pattern)


class _RenamedTokenizer:
    """A copy of a tokenizer in which each special token has a secret name.

    forbidden: the tokens' ids, which the copy must not make of a text; without the unknown token's, which is text.
    is_faithful: whether the copy encodes a text with every special token as the original does.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, tokens: list[tokenizers.AddedToken], pattern: re.Pattern[str]
    ) -> None:
        self._copy = tokenizers.Tokenizer.from_str(backend.to_str())
        self._copy.add_special_tokens([tokenizers.AddedToken(token.content, special=True) for token in tokens])
        self._copy.encode_special_tokens = True
        secret = secrets.token_hex(8)
        self._names = {token.content: f"\ue000{secret}:{index}\ue000" for index, token in enumerate(tokens)}
        self._copy.add_tokens(
            [
                tokenizers.AddedToken(
                    self._names[token.content],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                )
                for token in tokens
            ]
        )
        original = {text: token for text in self._names if (token := backend.token_to_id(text)) is not None}
        self._original_ids = {self._copy.token_to_id(self._names[text]): token for text, token in original.items()}
        unknown = getattr(backend.model, "unk_token", None)
        self.forbidden = frozenset(token for text, token in original.items() if text != unknown)
        sample = "".join(f"x {text} x{text}\n{text}x" for text in self._names)
        expected = backend.encode(sample, add_special_tokens=False).ids
        renamed = self.encode(self.rename(sample, pattern), add_special_tokens=False)
        self.is_faithful = self.original_ids(renamed) == expected

    def rename(self, text: str, pattern: re.Pattern[str]) -> str:
        """Return the text with the copy's names of its special tokens."""
        return pattern.sub(lambda found: self._names[found.group()], text)

    def original_ids(self, ids: list[int]) -> list[int]:
        """Return the original's token ids for those of the copy."""
        return [self._original_ids.get(token, token) for token in ids]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._copy.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def _any_of(texts: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _strings(value: Any) -> list[str]:
    """Return every string in a JSON value, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    return []
