"""The text of one continuation as a client may see it: no half characters, and nothing of a stop string too early."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from dispec.engine.errors import InvalidField
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.text.detokenize import IncrementalDetokenizer
from dispec.engine.text.tokenizer import Tokenizer


class StopStrings:
    """Ends a growing text at the first of some stop strings, none of them empty.

    The match that ends first wins, and of those that end at the same place the longest. What is held back is exactly
    the longest end of the text that begins a stop string. The cost per character does not depend on the length of the
    text or, on average, on that of the stop strings.
    """

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        self.matched: str | None = None
        self._include = include
        self._searches = [_Search(text) for text in stop]
        # What is held back begins a stop string, so that it need not be stored: it is `_held_of[:_num_held]`.
        self._held_of = ""
        self._num_held = 0

    def add(self, text: str) -> str:
        """What of the text is certain now. Once there is a match it is nothing."""
        if self.matched is not None:
            return ""
        if not self._searches:
            return text
        end = len(text)
        for search in self._searches:
            match = search.advance(text, end)
            if match is None:
                continue
            if self.matched is None or match < end or len(search.stop) > len(self.matched):
                self.matched, end = search.stop, match
        if self.matched is not None:
            kept = 0 if self._include else len(self.matched)
            return self._release(text, self._num_held + end - kept, "", 0)
        longest = max(self._searches, key=lambda search: search.length)
        return self._release(text, self._num_held + len(text) - longest.length, longest.stop, longest.length)

    def flush(self) -> str:
        """What was held back, at the end of the text. Nothing may be added after it."""
        return self._release("", self._num_held, "", 0)

    def _release(self, text: str, count: int, held_of: str, num_held: int) -> str:
        """The first `count` characters of what was held back and `text`; what is held back from now on."""
        released = self._held_of[: min(count, self._num_held)] + text[: max(count - self._num_held, 0)]
        self._held_of, self._num_held = held_of, num_held
        return released


class TextStream:
    """Token ids to the text of a continuation, which ends at a stop string.

    The pieces of `add` and `finish` together equal what `tokenizer.decode` of prompt and ids adds to that of the
    prompt, cut at the first stop string.
    The text of the first `params.min_tokens` tokens is always returned whole and at once: stop strings are looked for
    in what comes after it, and one that begins in it is none. A character belongs to the token that completes it.
    Without a tokenizer every text is empty.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, params.skip_special_tokens, prompt_token_ids) if tokenizer else None
        )
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._pieces: list[str] = []

    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended the text. Tokens added after it change nothing."""
        return self._stops.matched

    @property
    def text(self) -> str:
        """Everything returned so far. It is joined at each call."""
        return "".join(self._pieces)

    def add(self, token_id: int, ends: bool) -> str:
        """The text that the token makes certain: none if it `ends` the sequence, being a stop token."""
        if self._detokenizer is None or ends or self.stop_reason is not None:
            return ""
        self._num_tokens += 1
        return self._return(self._until_stop(self._detokenizer.add(token_id)))

    def finish(self) -> str:
        """What was held back. It may still hold a stop string. Nothing may be added after it."""
        if self._detokenizer is None or self.stop_reason is not None:
            return ""
        return self._return(self._until_stop(self._detokenizer.finish()) + self._stops.flush())

    def _until_stop(self, text: str) -> str:
        return self._stops.add(text) if self._num_tokens > self._min_tokens else text

    def _return(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text


def without_texts(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """What the engine gets to see: words as token ids, and no stop strings, which a `TextStream` looks for.

    Raises InvalidField if there are texts and no tokenizer.
    """
    if not params.stop and not params.bad_words:
        return params
    if tokenizer is None:
        name = "stop" if params.stop else "bad_words"
        raise InvalidField(name, f"{name} is given, but a model without a tokenizer makes no text")
    bad_words = (*params.bad_words_token_ids, *tokenizer.bad_word_token_ids(params.bad_words))
    return replace(params, stop=(), bad_words=(), bad_words_token_ids=bad_words)


class _Search:
    """Knuth, Morris and Pratt's search for one stop string.

    length: of the longest end of the text so far that begins the stop string.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        self._shorter = _shorter_beginnings(stop)

    def advance(self, text: str, end: int) -> int | None:
        """Read on to `text[:end]`; returns where in it the first match ends. Nothing may be read after a match."""
        stop, length, position = self.stop, self.length, 0
        while position < end:
            if length == 0:  # the usual case, which need not be walked in Python
                position = text.find(stop[0], position, end)
                if position < 0:
                    break
            character = text[position]
            position += 1
            while length and stop[length] != character:
                length = self._shorter[length]
            if stop[length] == character:
                length += 1
            if length == len(stop):
                return position
        self.length = length
        return None


@lru_cache(maxsize=256)  # shared by all choices of a request, and by requests that stop alike
def _shorter_beginnings(stop: str) -> tuple[int, ...]:
    """For each length, that of the longest shorter beginning of the stop string that ends `stop[:length]`."""
    shorter = [0, 0]
    for character in stop[1:-1]:
        length = shorter[-1]
        while length and stop[length] != character:
            length = shorter[length]
        shorter.append(length + 1 if stop[length] == character else 0)
    return tuple(shorter)
