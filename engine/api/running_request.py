"""A request between its start and its end: tokens in, `RequestOutput`s out."""

import time
from collections.abc import Sequence as Series

from dispec.engine.api.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from dispec.engine.api.prompts import TokenizedPrompt
from dispec.engine.sampling_params import RequestOutputKind, SamplingParams
from dispec.engine.scheduling import token_output
from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.scheduling.token_output import FinishReason, TokenOutput
from dispec.engine.text.text_stream import TextStream
from dispec.engine.text.tokenizer import Tokenizer


class RunningOutput:
    """One continuation of a prompt. finish_reason: once it has ended, which may be before the sequence does."""

    def __init__(self, sequence: Sequence, text: TextStream, tokenizer: Tokenizer | None) -> None:
        self.sequence = sequence
        self.text = text
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._stop_reason: str | int | None = None
        self._new_texts: list[str] = []
        self._num_tokens = 0
        self._num_returned = 0
        self._cumulative_logprob = 0.0
        self._logprobs: list[TokenLogprobs] = []

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def process(self, output: TokenOutput) -> None:
        """Take a token, and set `finish_reason` if it ends the output."""
        self._num_tokens += 1
        text, self.finish_reason, self._stop_reason = self.text.process(
            output.token_id, output.finish_reason, completes_grammar=output.completes_grammar
        )
        self._new_texts.append(text)
        if output.logprobs is not None:
            self._cumulative_logprob += output.logprobs.logprob
            self._logprobs.append(by_token_id(output.logprobs, self._tokenizer))

    def abort(self) -> None:
        """End the output, unless it has ended. Its text ends with what was held back."""
        if self.finish_reason is None:
            self._new_texts.append(self.text.finish())
            self.finish_reason = "abort"

    def take(self, is_delta: bool) -> CompletionOutput:
        """Return the output so far, or what has come since the last call."""
        start = self._num_returned if is_delta else 0
        text = "".join(self._new_texts) if is_delta else self.text.text
        self._num_returned = self._num_tokens
        self._new_texts.clear()
        first = self.sequence.num_prompt_tokens
        has_logprobs = self.sequence.params.logprobs is not None
        return CompletionOutput(
            index=self.sequence.index,
            text=text,
            token_ids=self.sequence.token_ids[first + start : first + self._num_tokens],
            cumulative_logprob=self._cumulative_logprob if has_logprobs else None,
            logprobs=self._logprobs[start:] if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )


class RunningRequest:
    """A request of `n` outputs. kind: of the `RequestOutput`s that `take` returns."""

    def __init__(
        self,
        first: Sequence,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        kind: RequestOutputKind,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.first = first
        self.outputs = [
            RunningOutput(sequence, TextStream(tokenizer, params, prompt.token_ids), tokenizer)
            for sequence in first.choices
        ]
        self.kind = kind
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._arrival_time = time.time()
        self._first_token_time: float | None = None
        self._last_token_time = first.arrival_time
        self._num_draft_tokens = self._num_accepted_tokens = 0
        self._changed: dict[int, None] = {}  # indices of outputs with news

    @property
    def is_finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def has_token(self) -> bool:
        """Whether the prompt is computed."""
        return self._first_token_time is not None

    def process(self, token: TokenOutput) -> bool:
        """Take a token of one of the outputs; return False if that output has ended before."""
        output = self.outputs[token.index]
        if output.finish_reason is not None:
            return False
        self._last_token_time = time.perf_counter()
        if self._first_token_time is None:
            self._first_token_time = self._last_token_time
        self._num_draft_tokens += token.num_accepted + token.num_rejected
        self._num_accepted_tokens += token.num_accepted
        output.process(token)
        self._changed[token.index] = None
        return True

    def abort(self) -> None:
        """End every output that has not ended, with the finish reason "abort"."""
        for index, output in enumerate(self.outputs):
            if output.finish_reason is None:
                output.abort()
                self._changed[index] = None

    def take(self) -> RequestOutput | None:
        """Return what is new, or all tokens so far, as the kind says; None if nothing is due.

        With `FINAL_ONLY` nothing is due before the request has finished.
        """
        is_finished = self.is_finished
        if not self._changed or (self.kind is RequestOutputKind.FINAL_ONLY and not is_finished):
            return None
        is_delta = self.kind is RequestOutputKind.DELTA
        indices: Series[int] = sorted(self._changed) if is_delta else range(len(self.outputs))
        self._changed.clear()
        first = self.first
        prompt_logprobs: list[TokenLogprobs | None] | None = None
        if first.params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(by_token_id(entry, self._tokenizer) for entry in first.prompt_logprobs)]
        return RequestOutput(
            request_id=first.request_id,
            prompt=self._prompt.text,
            prompt_token_ids=self._prompt.token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[self.outputs[index].take(is_delta) for index in indices],
            finished=is_finished,
            metrics=self._metrics(),
            num_cached_tokens=first.num_cached_tokens or 0,
        )

    def _metrics(self) -> RequestMetrics:
        arrival, last = self.first.arrival_time, self._last_token_time
        scheduled = last if self.first.scheduled_time is None else self.first.scheduled_time
        first_token = last if self._first_token_time is None else self._first_token_time
        num_tokens = sum(output.num_tokens for output in self.outputs)
        num_decoded = sum(max(0, output.num_tokens - 1) for output in self.outputs)
        decode_time = last - first_token
        return RequestMetrics(
            arrival_time=self._arrival_time,
            first_token_latency=first_token - arrival,
            queued_time=scheduled - arrival,
            prefill_time=first_token - scheduled,
            decode_time=decode_time,
            num_generation_tokens=num_tokens,
            tokens_per_second=num_decoded / decode_time if decode_time > 0 else 0.0,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
        )


def by_token_id(entry: token_output.TokenLogprobs, tokenizer: Tokenizer | None) -> TokenLogprobs:
    """Return a position's log-probabilities by token id: its own token, then the likeliest ones."""

    def logprob(token_id: int, value: float, rank: int) -> Logprob:
        text = None if tokenizer is None else tokenizer.decode([token_id], skip_special_tokens=False)
        return Logprob(value, rank, text)

    found = {entry.token_id: logprob(entry.token_id, entry.logprob, entry.rank)}
    for rank, (token_id, value) in enumerate(entry.top, start=1):
        if token_id not in found:
            found[token_id] = logprob(token_id, value, rank)
    return found
