"""Counts and rates of the answers in a conversation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dispec.serving.cli.commands import summary

if TYPE_CHECKING:
    from dispec.engine.api.outputs import RequestOutput


def answer_line(output: "RequestOutput", max_model_len: int) -> str:
    """Return a line on the last output of an answer: its tokens, their rate, and how much of the context is used."""
    parts = [summary(output), f"context {_context(output)} of {max_model_len}"]
    if count := output.metrics.num_draft_tokens:
        parts.append(f"{output.metrics.num_accepted_tokens} of {count} draft tokens accepted")
    return ", ".join(parts)


@dataclass
class ChatStatistics:
    """Sums over the complete answers.

    num_timed_tokens, decode_seconds: of the tokens after each answer's first.
    context: tokens of the last prompt and answer.
    """

    num_answers: int = 0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_timed_tokens: int = 0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    context: int = 0

    def add(self, output: "RequestOutput") -> None:
        """Count an answer by its last output."""
        metrics = output.metrics
        self.num_answers += 1
        self.num_tokens += metrics.num_generation_tokens
        self.num_prompt_tokens += len(output.prompt_token_ids)
        self.num_cached_tokens += output.num_cached_tokens
        self.num_draft_tokens += metrics.num_draft_tokens
        self.num_accepted_tokens += metrics.num_accepted_tokens
        self.num_timed_tokens += metrics.num_generation_tokens - 1
        self.decode_seconds += metrics.decode_time
        self.first_token_seconds += metrics.first_token_latency
        self.context = _context(output)

    def lines(self, max_model_len: int) -> Iterator[str]:
        """Yield what `/stats` shows."""
        yield f"answers       {self.num_answers}"
        rate = f", {self.num_timed_tokens / self.decode_seconds:.1f} tokens/s" if self.decode_seconds else ""
        yield f"tokens        {self.num_tokens}{rate}"
        if self.num_answers:
            yield f"first token   after {self.first_token_seconds / self.num_answers:.2f} s on average"
        if self.num_draft_tokens:
            yield f"draft tokens  {self.num_draft_tokens}, {self.num_accepted_tokens} of them accepted"
        yield f"prompts       {self.num_prompt_tokens} tokens, {self.num_cached_tokens} of them from the KV cache"
        yield f"context       {self.context} of {max_model_len} tokens"


def _context(output: "RequestOutput") -> int:
    return len(output.prompt_token_ids) + output.metrics.num_generation_tokens
