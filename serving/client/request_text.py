"""A request's tokens to the text that its reader sees, away from the event loop."""

from collections.abc import Sequence

import msgspec

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.scheduler_output import TokenOutput
from dispec.engine.scheduling.sequence import FinishReason, TokenLogprobs
from dispec.engine.text.text_stream import TextStream
from dispec.engine.text.tokenizer import Tokenizer


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
    num_right_guesses: int = 0
    num_wrong_guesses: int = 0


class RequestText:
    """Tokens of a request to updates. It belongs to the thread that reads from the engine; others may look at
    its numbers.

    is_continued: where the engine ends for length, another one goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        is_continued: bool = False,
    ) -> None:
        self._params = params
        self._is_continued = is_continued
        self._texts = [TextStream(tokenizer, params, prompt_token_ids) for _ in range(params.n)]
        self._last_times: list[float | None] = [None] * params.n
        self._has_ended = [False] * params.n
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.gaps: list[float] = []

    def take(self, token: TokenOutput, now: float) -> tuple[ChoiceUpdate, bool] | None:
        """What a token brings, and whether the engine must be told that its choice has ended.

        None for a token after the end, which the engine gave before it knew.
        """
        index, params = token.index, self._params
        if self._has_ended[index]:
            return None
        stream, reason = self._texts[index], token.finish_reason
        if reason == "length" and self._is_continued:
            reason = None
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
            token.num_accepted,
            token.num_rejected,
        ), tells

    def resume(self, outputs: list[list[int] | None], now: float) -> None:
        """Go on after tokens whose updates came from elsewhere, the last of them `now`; None is a choice that ended."""
        for index, tokens in enumerate(outputs):
            self._has_ended[index] = tokens is None
            for token_id in tokens or ():
                self._texts[index].add(token_id, ends=False)
                self._last_times[index] = now

    def _note(self, token: TokenOutput, now: float) -> None:
        last = self._last_times[token.index]
        if last is not None:
            self.gaps.append(now - last)
        self._last_times[token.index] = now
        self.num_tokens += 1
        if token.index == 0 and token.num_cached_tokens is not None:
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
        sum(update.num_right_guesses for update in updates),
        sum(update.num_wrong_guesses for update in updates),
    )
