"""Special tokens that a message spells out, as plain text in the prompt, so that no content begins or ends a turn.

A mark is put inside each such text before the chat template sees it, and behind one that is begun at the end of a
string, to which the template may join another. In the rendered prompt the special tokens without a mark are the
template's own. A copy of the tokenizer reads those by other names and everything else as text: it splits the prompt
where the original does, so that prefix spaces and stripped whitespace stay as they are.
"""

import re
import secrets
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import tokenizers

from dispec.engine.errors import InvalidField

# Some vocabularies do not call tokens special that begin turns, as DeepSeek's of fullwidth bars.
_CONTROL = re.compile("<[|\uff5c].*[|\uff5c]>", re.DOTALL)
_MARKS = (0xE001, 0xF8FF)  # private-use characters: the first of them that no message holds


class ChatText(NamedTuple):
    """A rendered conversation. `marked` has `mark` inside every special token that messages spell out."""

    plain: str
    marked: str
    mark: str | None


class SpecialTexts:
    """The texts of a tokenizer's special tokens."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def find_mark(self, *values: Any) -> str | None:
        """A character for `interrupt` that no string in the JSON values holds; None if none of them spells a token, or
        begins one at its end."""
        texts = [text for value in values for text in _strings(value)]
        if self._pattern is None or not any(self._spells(text) for text in texts):
            return None
        held = set().union(*texts)
        mark = next((mark for mark in map(chr, range(*_MARKS)) if mark not in held), None)
        if mark is None:
            raise InvalidField("messages", "messages hold every private-use character, one must be left for marks")
        return mark

    def interrupt(self, value: Any, mark: str) -> Any:
        """A copy of a JSON value with `mark` inside every special token that its strings spell out."""
        if isinstance(value, Mapping):
            return {self.interrupt(key, mark): self.interrupt(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.interrupt(item, mark) for item in value]
        if not isinstance(value, str) or self._pattern is None:
            return value
        while self._pattern.search(value) is not None:  # what a mark leaves over may spell another one
            value = self._pattern.sub(lambda found: f"{found[0][0]}{mark}{found[0][1:]}", value)
        return value + mark if self._begins_at_the_end(value) else value

    def text(self, marked: str, mark: str) -> ChatText:
        """A prompt that was rendered from interrupted values. It needs no marks if they keep no token apart."""
        assert self._pattern is not None
        plain = marked.replace(mark, "")
        parts = [part.replace(mark, "") for part in self._pattern.split(marked)]
        if parts == self._pattern.split(plain) and self._num_normalized(plain) in (None, len(parts) - 1):
            return ChatText(plain, plain, None)
        return ChatText(plain, marked, mark)

    def encode(self, marked: str, mark: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text whose special tokens are those without a mark. Raises InvalidField if the vocabulary
        has no other way to write the text of one."""
        assert self._pattern is not None
        text = self._reader.renamed(marked, self._pattern).replace(mark, "")
        ids = self._reader.encode(text, add_special_tokens=False)
        if not self._reader.is_faithful or not self._reader.forbidden.isdisjoint(ids):
            raise InvalidField(
                "messages",
                "messages spell out a special token that this model's tokenizer cannot take for text: leave it out, or"
                " allow it with allow_special_tokens_in_content",
            )
        if add_special_tokens:
            ids = self._reader.encode(text, add_special_tokens=True)
        return self._reader.own(ids)

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        texts = sorted((token.content for token in self._specials), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    def _spells(self, text: str) -> bool:
        assert self._pattern is not None
        return bool(self._pattern.search(text) or self._num_normalized(text)) or self._begins_at_the_end(text)

    def _num_normalized(self, text: str) -> int | None:
        """How many special tokens a text spells once it is normalized; None if they are looked for before that."""
        normalizer = self._backend.normalizer
        if normalizer is None or self._normalized_pattern is None:
            return None
        return len(self._normalized_pattern.findall(normalizer.normalize_str(text)))

    @cached_property
    def _normalized_pattern(self) -> re.Pattern[str] | None:
        if not any(token.normalized for token in self._specials):
            return None
        texts = {token.content for token in self._specials}
        texts |= {self._backend.normalizer.normalize_str(text) for text in texts}
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))

    def _begins_at_the_end(self, text: str) -> bool:
        """Whether the text ends with the beginning of a special token."""
        end = text[-self._longest_beginning :] if self._beginnings else ""
        return any(end[index:] in self._beginnings for index in range(len(end)) if end[index] in self._beginnings)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(token.content[:end] for token in self._specials for end in range(1, len(token.content)))

    @cached_property
    def _longest_beginning(self) -> int:
        return max(map(len, self._beginnings))

    @cached_property
    def _specials(self) -> list[tokenizers.AddedToken]:
        tokens = [token for token in self._backend.get_added_tokens_decoder().values() if len(token.content) > 1]
        return [token for token in tokens if token.special or _CONTROL.fullmatch(token.content)]

    @cached_property
    def _reader(self) -> "_Reader":
        assert self._pattern is not None
        return _Reader(self._backend, self._specials, self._pattern)


class _Reader:
    """A copy of a tokenizer in which each special token has another, secret name.

    forbidden: the tokens' ids, which the copy must not make of a text; that of the unknown token may come of any.
    is_faithful: whether it reads a text with every special token as the original does.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, specials: list[tokenizers.AddedToken], pattern: re.Pattern[str]
    ) -> None:
        self._copy = tokenizers.Tokenizer.from_str(backend.to_str())
        self._copy.add_special_tokens([tokenizers.AddedToken(token.content, special=True) for token in specials])
        self._copy.encode_special_tokens = True
        secret = secrets.token_hex(8)
        self._names = {token.content: f"\ue000{secret}:{index}\ue000" for index, token in enumerate(specials)}
        self._copy.add_tokens(
            [
                tokenizers.AddedToken(
                    self._names[token.content],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                )
                for token in specials
            ]
        )
        own = {text: token for text in self._names if (token := backend.token_to_id(text)) is not None}
        self._ids = {self._copy.token_to_id(self._names[text]): token for text, token in own.items()}
        unknown = getattr(backend.model, "unk_token", None)
        self.forbidden = frozenset(token for text, token in own.items() if text != unknown)
        sample = "".join(f"x {text} x{text}\n{text}x" for text in self._names)
        expected = backend.encode(sample, add_special_tokens=False).ids
        self.is_faithful = self.own(self.encode(self.renamed(sample, pattern), add_special_tokens=False)) == expected

    def renamed(self, text: str, pattern: re.Pattern[str]) -> str:
        """The text with the copy's names of its special tokens."""
        return pattern.sub(lambda found: self._names[found.group()], text)

    def own(self, ids: list[int]) -> list[int]:
        """The original's token ids for those of the copy."""
        return [self._ids.get(token, token) for token in ids]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._copy.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def _strings(value: Any) -> list[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    return []
