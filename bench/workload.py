"""The work that every benchmark and every contestant gets."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """`concurrency` prompts of random tokens at once, each answered greedily with exactly `output_tokens` tokens."""

    concurrency: int
    prompt_tokens: int = 128
    output_tokens: int = 128

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        """The prompts as token ids. A new seed gives new prompts, so that no cache can have seen them."""
        # The first ids of a vocabulary are often special tokens.
        rng = random.Random(f"{seed} {self.concurrency}")
        return [
            [rng.randrange(min(1000, vocab_size // 2), vocab_size) for _ in range(self.prompt_tokens)]
            for _ in range(self.concurrency)
        ]
