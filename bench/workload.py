"""The work that every benchmark and every contestant gets."""

import random
from dataclasses import dataclass


def random_tokens(count: int, vocab_size: int, seed: str) -> list[int]:
    """Tokens that are no special ones: those often have the first ids of a vocabulary."""
    rng = random.Random(seed)
    return [rng.randrange(min(1000, vocab_size // 2), vocab_size) for _ in range(count)]


@dataclass(frozen=True)
class Workload:
    """`concurrency` prompts of random tokens at once, each answered greedily with exactly `output_tokens` tokens.

    shared_tokens: with which all prompts of a seed begin; the `prompt_tokens` count them.
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
        """Of one sequence in the end."""
        return self.prompt_tokens + self.output_tokens

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        """The prompts as token ids. A new seed gives new prompts, so that no cache can have seen them."""
        shared = random_tokens(self.shared_tokens, vocab_size, f"prefix {seed}")
        own = self.prompt_tokens - self.shared_tokens
        return [
            shared + random_tokens(own, vocab_size, f"{seed} {self.concurrency} {index}")
            for index in range(self.concurrency)
        ]


def sizes(listed: str) -> list[int]:
    """Numbers that a user gave with commas between. Raises ValueError."""
    try:
        numbers = [int(number) for number in listed.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{listed!r} is not a list of numbers of at least 1 with commas between")
    return numbers
