"""A request's tokens to the text that its reader sees, away from the event loop, and its texts to tokens."""

from collections.abc import Iterable
from dataclasses import replace

import msgspec

from engine.messages import Token
from engine.sampling_params import SamplingParams
from engine.sequence import FinishReason, TokenLogprobs
from engine.text_stream import TextStream
from engine.tokenizer import Tokenizer
from serving.engine_errors import RequestRefused


class ChoiceUpdate(msgspec.Struct, frozen=True):
    """News of one choice: tokens, and the text that has become certain, which may be empty.

    Several steps are one update where the reader was slower. prompt_logprobs (without the first token's) and
    num_cached_tokens come with the first update of choice 0. An aborted choice ends with an update without tokens.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int | None = None


class RequestText:
    """Tokens of a request to updates. It belongs to the thread that reads from the engine; others may look at
    its numbers."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self._params = params
        self._texts = [TextStream(tokenizer, params) for _ in range(params.n)]
        self._last_times: list[float | None] = [None] * params.n
        self._has_ended = [False] * params.n
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.gaps: list[float] = []

    def take(self, token: Token, now: float) -> tuple[ChoiceUpdate, bool] | None:
        """What a token brings, and whether the engine must be told that its choice has ended.

        None for a token after the end, which the engine gave before it knew.
        """
        index, params = token.choice, self._params
        if self._has_ended[index]:
            return None
        stream, reason = self._texts[index], token.finish_reason
        text = stream.add(token.token_id, ends=reason == "stop")
        if reason is not None:
            text += stream.finish()
        stop_reason: str | int | None = stream.stop_reason
        tells = stop_reason is not None and reason is None
        if stop_reason is not None:
            reason = "stop"
        elif reason == "stop" and token.token_id in params.stop_token_ids:
            stop_reason = token.token_id
        self._has_ended[index] = reason is not None
        self._note(token, now)
        logprobs = [token.logprobs] if token.logprobs is not None else None
        first = index == 0 and token.num_cached_tokens is not None
        return ChoiceUpdate(
            index,
            text,
            [token.token_id],
            logprobs,
            reason,
            stop_reason,
            token.prompt_logprobs if first else None,
            token.num_cached_tokens if first else None,
        ), tells

    def _note(self, token: Token, now: float) -> None:
        last = self._last_times[token.choice]
        if last is not None:
            self.gaps.append(now - last)
        self._last_times[token.choice] = now
        self.num_tokens += 1
        if token.choice == 0 and token.num_cached_tokens is not None:
            self.num_cached_tokens = token.num_cached_tokens


def merged(updates: list[ChoiceUpdate]) -> ChoiceUpdate:
    """Updates of one choice as one."""
    if len(updates) == 1:
        return updates[0]
    first, last = updates[0], updates[-1]
    logprobs = [entry for update in updates for entry in update.logprobs or ()]
    return ChoiceUpdate(
        first.index,
        "".join(update.text for update in updates),
        [token for update in updates for token in update.token_ids],
        logprobs if any(update.logprobs is not None for update in updates) else None,
        last.finish_reason,
        last.stop_reason,
        first.prompt_logprobs,
        first.num_cached_tokens,
    )


def without_texts(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """What the engine gets to see: words as token ids, and no stop strings, which are looked for in the text here.

    Raises RequestRefused if there are texts and no tokenizer.
    """
    if not params.stop and not params.bad_words:
        return params
    if tokenizer is None:
        name = "stop" if params.stop else "bad_words"
        raise RequestRefused(f"{name} is given, but a model without a tokenizer makes no text")
    bad_words = (*params.bad_words_token_ids, *_token_ids(params.bad_words, tokenizer))
    return replace(params, stop=(), bad_words=(), bad_words_token_ids=bad_words)


def _token_ids(words: Iterable[str], tokenizer: Tokenizer) -> Iterable[tuple[int, ...]]:
    """Of texts that shall not be generated, at the start of a word and within one."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            if ids := tuple(tokenizer.encode(text, add_special_tokens=False)):
                found[ids] = None
    return found
