"""A request between its start and its completion: tokens in, text out."""

import time
from dataclasses import dataclass

from dispec.engine.api.outputs import Choice, Completion, Timing
from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.scheduling.token_output import TokenOutput
from dispec.engine.text.text_stream import TextStream


@dataclass
class RunningChoice:
    """One continuation of a prompt. result: once it has ended, which may be before the sequence does."""

    sequence: Sequence
    text: TextStream
    result: Choice | None = None
    num_tokens: int = 0
    first_token_seconds: float = 0.0

    def process(self, output: TokenOutput) -> str:
        """Return the text that a token makes certain, and set `result` if the token ends the choice."""
        sequence, params = self.sequence, self.sequence.params
        seconds = time.perf_counter() - sequence.arrival_time
        self.first_token_seconds = self.first_token_seconds or seconds
        self.num_tokens += 1
        text, finish_reason, stop_reason = self.text.process(
            output.token_id, output.finish_reason, completes_grammar=output.completes_grammar
        )
        if finish_reason is not None:
            self.result = Choice(
                token_ids=sequence.output_token_ids[: self.num_tokens],
                text=self.text.text,
                finish_reason=finish_reason,
                stop_reason=stop_reason,
                logprobs=sequence.logprobs[: self.num_tokens] if params.logprobs is not None else None,
                timing=Timing(self.first_token_seconds, seconds),
            )
        return text


def completion_of(choices: list[RunningChoice]) -> Completion | None:
    """Return the completion of a request; None while one of its choices runs."""
    results = tuple(choice.result for choice in choices if choice.result is not None)
    if len(results) < len(choices):
        return None
    first = choices[0].sequence
    return Completion(
        prompt_token_ids=first.token_ids[: first.num_prompt_tokens],
        choices=results,
        prompt_logprobs=[None, *first.prompt_logprobs] if first.params.prompt_logprobs is not None else None,
        num_cached_tokens=first.num_cached_tokens or 0,
    )
