"""What a request gets back."""

from dataclasses import dataclass

from dispec.engine.scheduling.sequence import FinishReason, TokenLogprobs


@dataclass(frozen=True)
class Timing:
    """When what happened to a request, in seconds from its arrival. `first_token` includes queueing and prefill."""

    first_token: float
    finished: float

    def tokens_per_second(self, num_tokens: int) -> float:
        """The rate of decoding after the first token; 0 where there was only one."""
        elapsed = self.finished - self.first_token
        return (num_tokens - 1) / elapsed if num_tokens > 1 and elapsed > 0 else 0.0


@dataclass(frozen=True)
class Choice:
    """One continuation. `text` leaves special tokens out (unless asked not to), `token_ids` has them.

    stop_reason: the stop string or the one of `stop_token_ids` that ended it.
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
    """A finished request: `n` choices, the first of which can be read off directly.

    prompt_logprobs: of each token of the prompt, where asked for; the first one's is None.
    num_cached_tokens: prompt tokens whose keys and values were already in the cache.
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
    """News of a streamed request: the text of one choice that has become certain, and on the very last piece the
    whole completion.

    index: of the choice. finish_reason: on the choice's last piece.
    """

    text: str
    token_id: int | None
    index: int = 0
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
