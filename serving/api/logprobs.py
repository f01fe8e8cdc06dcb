"""Log-probabilities in the three shapes of the API, without NaN and infinity."""

from collections.abc import Iterable, Sequence
from functools import cached_property

from dispec.engine.scheduling.token_output import TokenLogprobs
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.api.response_bodies import ChatLogprob, ChatLogprobs, CompletionLogprobs, PromptLogprobs, TopLogprob

_LOWEST = -9999.0  # OpenAI's value for impossible tokens


def finite(value: float) -> float:
    """Return the value, or the lowest one for a NaN or minus infinity."""
    return value if value >= _LOWEST else _LOWEST  # a NaN compares with nothing


class TokenTexts:
    """The texts of single tokens. A part of a character is written `bytes:` and its bytes, as OpenAI does."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._special_ids = frozenset() if tokenizer is None else tokenizer.special_ids
        self._known: dict[int, tuple[str, bytes]] = {}

    @cached_property
    def by_id(self) -> "TokenTexts":
        """The texts `token_id:` and the id, with the same bytes."""
        return _TokenIds(self._tokenizer)

    def of(self, token_id: int) -> tuple[str, bytes]:
        """Return the text and the bytes of a token."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._find(token_id)
        return known

    def _find(self, token_id: int) -> tuple[str, bytes]:
        if self._tokenizer is None:  # a model that was made from a `ModelConfig`
            return f"token_id:{token_id}", b""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def length_in_text(self, token_id: int, skip_special_tokens: bool) -> int:
        """Return how many characters of an output begin in this token."""
        if skip_special_tokens and token_id in self._special_ids:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self.of(token_id)[1])

    def length_at(self, token_id: int, text: str, offset: int) -> int:
        """Return the same in a given text, which may lack the BOS and the first space that encoding adds."""
        spelled = self.of(token_id)[1].decode(errors="replace")
        if text.startswith(spelled, offset):
            return len(spelled)
        if spelled.startswith(" ") and text.startswith(spelled[1:], offset):
            return len(spelled) - 1
        return self.length_in_text(token_id, skip_special_tokens=True)


class _TokenIds(TokenTexts):
    def of(self, token_id: int) -> tuple[str, bytes]:
        return f"token_id:{token_id}", super().of(token_id)[1]


def chat_logprobs(texts: TokenTexts, entries: Iterable[TokenLogprobs], count: int) -> ChatLogprobs:
    """Return the shape of chats, with the `count` likeliest tokens at each place."""

    def top(token_id: int, logprob: float) -> TopLogprob:
        text, data = texts.of(token_id)
        return TopLogprob(text, finite(logprob), list(data))

    content = []
    for entry in entries:
        own = top(entry.token_id, entry.logprob)
        content.append(ChatLogprob(own.token, own.logprob, own.bytes, [top(*item) for item in entry.top[:count]]))
    return ChatLogprobs(content)


class CompletionLogprobsBuilder:
    """Makes the four lists of completions for one choice, piece by piece. `text_offset` counts through all pieces."""

    def __init__(self, texts: TokenTexts, count: int, skip_special_tokens: bool) -> None:
        self._texts = texts
        self._count = count
        self._skip_special_tokens = skip_special_tokens
        self._offset = 0
        self._has_output = False  # the first token of an output may lack its space

    def of_prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs], text: str) -> CompletionLogprobs:
        """Return the lists of a prompt that is echoed as `text`. Its first token has no probability."""
        found = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, (None, *entries), strict=False):
            self._add(found, token_id, entry)
            self._offset += self._texts.length_at(token_id, text, self._offset)
        self._offset = len(text)
        return found

    def of_output(
        self, entries: Iterable[TokenLogprobs], text: str, prompt: CompletionLogprobs | None = None
    ) -> CompletionLogprobs:
        """Return the lists of `prompt` and of output tokens that make `text` certain, which may be less than theirs."""
        found = prompt or CompletionLogprobs([], [], [], [])
        for entry in entries:
            self._add(found, entry.token_id, entry)
            length = self._texts.length_in_text(entry.token_id, self._skip_special_tokens)
            if length and not self._has_output:
                self._has_output = True
                spelled = self._texts.of(entry.token_id)[1]
                length -= spelled.startswith(b" ") and text != "" and not text.startswith(" ")
            self._offset += length
        return found

    def _add(self, found: CompletionLogprobs, token_id: int, entry: TokenLogprobs | None) -> None:
        found.text_offset.append(self._offset)
        found.tokens.append(self._texts.of(token_id)[0])
        found.token_logprobs.append(None if entry is None else finite(entry.logprob))
        found.top_logprobs.append(None if entry is None else self._top(entry))

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        # The token itself is always among them. Of two tokens with the same text, the likelier stays.
        for token_id, value in (*entry.top[: self._count], (entry.token_id, entry.logprob)):
            top.setdefault(self._texts.of(token_id)[0], finite(value))
        return top


def prompt_logprobs(texts: TokenTexts, entries: Sequence[TokenLogprobs], count: int) -> PromptLogprobs:
    """Return vLLM's shape: for each token of the prompt, itself and the likeliest ones by id."""
    found: PromptLogprobs = [None]
    for entry in entries:
        tops = {
            str(token_id): {"logprob": finite(value), "rank": rank, "decoded_token": texts.of(token_id)[0]}
            for rank, (token_id, value) in enumerate(entry.top[:count], start=1)
        }
        own = {"logprob": finite(entry.logprob), "rank": entry.rank, "decoded_token": texts.of(entry.token_id)[0]}
        found.append({str(entry.token_id): own, **tops})
    return found
