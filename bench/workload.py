"""The work that every benchmark and every contestant gets."""

import random
from dataclasses import dataclass


def random_tokens(count: int, vocab_size: int, seed: str) -> list[int]:
    """Tokens that are no special ones: those often have the first ids of a vocabulary."""
    rng = random.Random(seed)
    return [rng.randrange(min(1000, vocab_size // 2), vocab_size) for _ in range(count)]


@dataclass(frozen=True)
class Workload:
    """`concurrency` prompts of random tokens at once, each answered greedily with exactly `output_tokens` tokens."""

    concurrency: int
    prompt_tokens: int = 128
    output_tokens: int = 128

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        """The prompts as token ids. A new seed gives new prompts, so that no cache can have seen them."""
        return [
            random_tokens(self.prompt_tokens, vocab_size, f"{seed} {self.concurrency} {index}")
            for index in range(self.concurrency)
        ]
