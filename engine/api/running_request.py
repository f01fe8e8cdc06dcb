"""A request between its start and its completion: the engine's tokens in, pieces of text out."""

import time
from dataclasses import dataclass, field

from dispec.engine.api.outputs import Choice, Completion, Timing
from dispec.engine.scheduling.sequence import Sequence, TokenLogprobs
from dispec.engine.text.text_stream import TextStream


@dataclass
class RunningChoice:
    """One continuation of a prompt. `num_tokens` counts those before a stop string, which may be noticed later."""

    sequence: Sequence
    text: TextStream
    num_tokens: int = 0
    first_token: float = 0.0
    finished: float = 0.0

    def take(self, token_id: int, ends: bool, is_last: bool) -> str:
        """Note a token's arrival; the text that it makes certain. May find that a stop string ends the choice."""
        now = time.perf_counter() - self.sequence.arrival_time
        self.num_tokens += 1
        self.first_token = self.first_token or now
        self.finished = now
        new = self.text.add(token_id, ends=ends)
        return new + self.text.finish() if is_last else new

    def choice(self) -> Choice:
        sequence, reason = self.sequence, self.sequence.finish_reason
        assert reason is not None
        stop_reason: str | int | None = self.text.stop_reason
        last = sequence.token_ids[-1]
        if stop_reason is not None:
            reason = "stop"
        elif reason == "stop" and last in sequence.params.stop_token_ids:
            stop_reason = last
        return Choice(
            token_ids=sequence.output_token_ids[: self.num_tokens],
            text=self.text.text,
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=self._logprobs(),
            timing=Timing(self.first_token, self.finished),
        )

    def _logprobs(self) -> list[TokenLogprobs] | None:
        return self.sequence.logprobs[: self.num_tokens] if self.sequence.params.logprobs is not None else None


@dataclass
class RunningRequest:
    """A prompt with its choices, and those that have ended."""

    choices: list[RunningChoice]
    done: list[Choice | None] = field(init=False)

    def __post_init__(self) -> None:
        self.done = [None] * len(self.choices)

    def completion(self) -> Completion | None:
        """The whole, once every choice has ended."""
        choices = tuple(choice for choice in self.done if choice is not None)
        if len(choices) < len(self.choices):
            return None
        first = self.choices[0].sequence
        return Completion(
            prompt_token_ids=first.token_ids[: first.num_prompt_tokens],
            choices=choices,
            prompt_logprobs=[None, *first.prompt_logprobs] if first.params.prompt_logprobs is not None else None,
            num_cached_tokens=first.num_cached_tokens or 0,
        )
