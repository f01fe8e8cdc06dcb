"""The prompts of benchmarks."""

import random
from dataclasses import dataclass


def random_tokens(count: int, vocab_size: int, seed: str) -> list[int]:
    """Return random token ids above 1,000, since special tokens often have the first ids of a vocabulary."""
    rng = random.Random(seed)
    return [rng.randrange(min(1000, vocab_size // 2), vocab_size) for _ in range(count)]


@dataclass(frozen=True)
class Workload:
    """`concurrency` simultaneous prompts of random tokens, each continued greedily by exactly `output_tokens` tokens.

    shared_tokens: length of the prefix that all prompts of a seed share, counted in `prompt_tokens`.
    """

    concurrency: int
    prompt_tokens: int = 128
    output_tokens: int = 128
    shared_tokens: int = 0

    def __post_init__(self) -> None:
        if min(self.concurrency, self.prompt_tokens, self.output_tokens) < 1:
            raise ValueError(f"{self}: concurrency, prompt_tokens and output_tokens must be at least 1")
        if not 0 <= self.shared_tokens < self.prompt_tokens:
            raise ValueError(f"shared_tokens is {self.shared_tokens}, must be between 0 and {self.prompt_tokens - 1}")

    @property
    def tokens(self) -> int:
        """Return the final length of one sequence."""
        return self.prompt_tokens + self.output_tokens

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        """Return the prompts as token ids. A new seed gives prompts that no cache holds."""
        shared = random_tokens(self.shared_tokens, vocab_size, f"prefix {seed}")
        own = self.prompt_tokens - self.shared_tokens
        return [
            shared + random_tokens(own, vocab_size, f"{seed} {self.concurrency} {index}")
            for index in range(self.concurrency)
        ]


def sizes(listed: str) -> list[int]:
    """Parse a comma-separated list of positive integers. Raises ValueError."""
    try:
        numbers = [int(number) for number in listed.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{listed!r} must be a comma-separated list of integers of at least 1")
    return numbers
