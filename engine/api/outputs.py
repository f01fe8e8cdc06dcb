"""The results of a request: completions, and pieces of a stream."""

from dataclasses import dataclass

from dispec.engine.scheduling.token_output import FinishReason, TokenLogprobs


@dataclass(frozen=True)
class Timing:
    """Seconds from a request's arrival to its first token, queueing and prefill included, and to its end."""

    first_token: float
    finished: float

    def tokens_per_second(self, num_tokens: int) -> float:
        """Return the rate of decoding after the first token; 0 for a single token."""
        elapsed = self.finished - self.first_token
        return (num_tokens - 1) / elapsed if num_tokens > 1 and elapsed > 0 else 0.0


@dataclass(frozen=True)
class Choice:
    """One continuation of a prompt.

    token_ids: with special tokens, which `text` has only without `skip_special_tokens`.
    stop_reason: the stop string, or the one of `stop_token_ids`, that ended the choice.
    logprobs: of each of `token_ids`, where asked for.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: list[TokenLogprobs] | None
    timing: Timing


@dataclass(frozen=True)
class Completion:
    """A finished request: its `n` choices, the first of which is also read from the properties.

    prompt_logprobs: of each token of the prompt, where asked for; the first token's is None.
    num_cached_tokens: prompt tokens that were found in the KV cache.
    """

    prompt_token_ids: list[int]
    choices: tuple[Choice, ...]
    prompt_logprobs: list[TokenLogprobs | None] | None
    num_cached_tokens: int

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        return self.choices[0].stop_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.choices[0].logprobs

    @property
    def timing(self) -> Timing:
        return self.choices[0].timing


@dataclass(frozen=True)
class Piece:
    """A token of a streamed request, with the text that it makes certain.

    index: of the choice. finish_reason: in the choice's last piece. completion: in the request's last piece.
    """

    text: str
    token_id: int | None
    index: int = 0
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
