"""The text of an output as a client may see it: whole characters, cut at the first stop string."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from dispec.engine.errors import InvalidField
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.token_output import FinishReason
from dispec.engine.text.detokenizer import make_detokenizer
from dispec.engine.text.tokenizer import Tokenizer


class StopStrings:
    """Ends a growing text at the first of some stop strings, none of them empty.

    The match that ends first wins, and the longest of those that end at the same place. Only the longest end of the
    text that begins a stop string is held back.
    """

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        """`include`: leave the stop string in the text."""
        self.matched: str | None = None
        self._stop = tuple(stop)
        self._include = include
        self._first = frozenset(text[0] for text in stop)
        self._longest_beginning = max(map(len, stop), default=1) - 1
        self._held = ""

    def add(self, text: str) -> str:
        """Return the text that is certain now. It is empty after a match."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        ends = [(start + len(stop), -len(stop), stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            end, _, self.matched = min(ends)
            self._held = ""
            return text[: end if self._include else end - len(self.matched)]
        certain = len(text)
        for start in range(max(len(text) - self._longest_beginning, 0), len(text)):
            if text[start] in self._first and self._begins_stop(text[start:]):
                certain = start
                break
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """Return the text held back, at the end of the output. Nothing may be added afterwards."""
        held, self._held = self._held, ""
        return held

    def _begins_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)


class TextUpdate(NamedTuple):
    """What a token brings. stop_reason: the stop string or stop token that ended the output."""

    text: str
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class TextStream:
    """The text of one output, token by token, up to a stop string.

    Joined, the pieces of `add` and `finish` are the text by which `tokenizer.decode` of prompt and output is longer
    than that of the prompt, cut at the first stop string. The text of the first `params.min_tokens` tokens is returned
    at once, and no stop string begins in it. A character belongs to the token that completes it. Without a tokenizer
    all text is empty. kept_token_ids: special tokens that are never skipped, because a parser reads them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        kept_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        skips = params.skip_special_tokens
        self._detokenizer = make_detokenizer(tokenizer, skips, prompt_token_ids, kept_token_ids) if tokenizer else None
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._stop_token_ids = params.stop_token_ids
        self._num_tokens = 0
        self._pieces: list[str] = []

    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended the text. Tokens added after it change nothing."""
        return self._stops.matched

    @property
    def text(self) -> str:
        """All text returned so far, joined at each call."""
        return "".join(self._pieces)

    def add(self, token_id: int, ends: bool) -> str:
        """Return the text that the token makes certain; none if it is the stop token that `ends` the output."""
        if self._detokenizer is None or ends or self.stop_reason is not None:
            return ""
        self._num_tokens += 1
        return self._return(self._until_stop(self._detokenizer.add(token_id)))

    def finish(self) -> str:
        """Return the text held back, which may hold a stop string. Nothing may be added afterwards."""
        if self._detokenizer is None or self.stop_reason is not None:
            return ""
        return self._return(self._until_stop(self._detokenizer.finish()) + self._stops.flush())

    def process(
        self, token_id: int, finish_reason: FinishReason | None, *, completes_grammar: bool = False
    ) -> TextUpdate:
        """Return what a token brings: its text, with the text held back where the output ends, and the end's reasons.

        finish_reason: the engine's, which knows no stop strings. completes_grammar: as in `TokenOutput`.
        """
        text = self.add(token_id, ends=finish_reason == "stop" and not completes_grammar)
        if finish_reason is not None:
            text += self.finish()
        if self.stop_reason is not None:
            return TextUpdate(text, "stop", self.stop_reason)
        is_stop_token = finish_reason == "stop" and token_id in self._stop_token_ids
        return TextUpdate(text, finish_reason, token_id if is_stop_token else None)

    def _until_stop(self, text: str) -> str:
        return self._stops.add(text) if self._num_tokens > self._min_tokens else text

    def _return(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text


def tokenize_bad_words(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """Return parameters with bad words as token ids. Raises InvalidField if there is no tokenizer."""
    if not params.bad_words:
        return params
    ids = _required(tokenizer, "bad_words").bad_word_token_ids(params.bad_words)
    return replace(params, bad_words=(), bad_words_token_ids=(*params.bad_words_token_ids, *ids))


def without_texts(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """Return the engine's part of parameters: bad words as token ids, and no stop strings, which `TextStream` finds.

    Raises InvalidField for texts without a tokenizer.
    """
    if params.stop:
        _required(tokenizer, "stop")
        params = replace(params, stop=())
    return tokenize_bad_words(params, tokenizer)


def _required(tokenizer: Tokenizer | None, field: str) -> Tokenizer:
    if tokenizer is None:
        raise InvalidField(field, f"{field} is given, must be left out for a model without a tokenizer")
    return tokenizer
