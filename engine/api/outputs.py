"""The results of a request, under vLLM's names."""

import reprlib
from dataclasses import dataclass
from typing import NamedTuple

from dispec.engine.scheduling.token_output import FinishReason

_SHOWN_CHARACTERS = 60  # of a text in a repr
_SHOWN_TOKENS = 6


class Logprob(NamedTuple):
    """How probable a token was at its position, by the model itself: before penalties, temperature and filters.

    logprob: natural logarithm. rank: 1 for the likeliest token.
    decoded_token: the token's text alone, with U+FFFD for parts of characters; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""The token at a position and the likeliest ones, by token id: the position's own token first, then by rank."""


@dataclass(frozen=True)
class RequestMetrics:
    """Times of a request up to its newest token, in seconds.

    arrival_time: since the epoch.
    first_token_latency: from the arrival to the first token, so `queued_time` + `prefill_time`.
    queued_time: from the arrival to the first step that computes the request.
    prefill_time: from that step to the first token.
    decode_time: from the first token to the newest one.
    num_generation_tokens: tokens of all outputs.
    tokens_per_second: tokens of an output after its first, per second of `decode_time`, added up over the outputs;
        0 without any.
    num_draft_tokens, num_accepted_tokens: draft tokens that were verified, and those of them that were accepted.
    """

    arrival_time: float
    first_token_latency: float
    queued_time: float
    prefill_time: float
    decode_time: float
    num_generation_tokens: int
    tokens_per_second: float
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def e2e_latency(self) -> float:
        """Seconds from the arrival to the newest token."""
        return self.first_token_latency + self.decode_time


@dataclass(frozen=True, repr=False)
class CompletionOutput:
    """One continuation of a prompt: all of it, or what is new in it, as the call says.

    index: of the continuation, from 0 to n - 1.
    text: without special tokens, unless `skip_special_tokens` is off. token_ids: with them.
    cumulative_logprob: sum of the log-probabilities of all tokens so far, where `logprobs` are asked for.
    logprobs: an entry for each of `token_ids`, where asked for.
    finish_reason: "stop", "length" or "abort"; None while the continuation runs.
    stop_reason: the stop string, or the one of `stop_token_ids`, that ended the continuation.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def __repr__(self) -> str:
        return (
            f"CompletionOutput(index={self.index}, text={_cut(self.text)}, {_counted(self.token_ids)},"
            f" finish_reason={self.finish_reason!r}, stop_reason={self.stop_reason!r})"
        )


@dataclass(frozen=True, repr=False)
class RequestOutput:
    """The outputs of a request for one prompt.

    prompt: the text, where the prompt was given or rendered as one.
    prompt_logprobs: an entry for each of `prompt_token_ids`, where asked for; the first is None.
    outputs: continuations in the order of their indices.
    finished: whether all continuations have ended.
    num_cached_tokens: prompt tokens that were found in the KV cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int

    def __repr__(self) -> str:
        prompt = _counted(self.prompt_token_ids, "prompt_token_ids") if self.prompt is None else _cut(self.prompt)
        shown = prompt if self.prompt is None else f"prompt={prompt}"
        return f"RequestOutput({self.request_id!r}, {shown}, outputs={self.outputs!r}, finished={self.finished})"


def _cut(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…")


def _counted(token_ids: list[int], name: str = "token_ids") -> str:
    shown = reprlib.Repr()
    shown.maxlist = _SHOWN_TOKENS
    return f"{name}={shown.repr(token_ids)} ({len(token_ids)})"
