"""The position of one sequence's output in its grammar."""

from collections.abc import Iterator, Sequence

import numpy as np
from llguidance import LLMatcher


class GrammarState:
    """Follows the output of one sequence, and tells which tokens may come next.

    The state moves only over tokens that the sequence keeps: masks behind draft tokens are computed ahead, and the
    matcher is rolled back.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, num_prompt_tokens: int) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)
        self._num_seen = num_prompt_tokens

    @property
    def is_complete(self) -> bool:
        """Whether the output is whole and no token can follow."""
        return self._matcher.is_stopped()

    def advance(self, token_ids: Sequence[int]) -> None:
        """Move over the tokens that are new since the last call. token_ids: all of the prompt and the output.

        Raises RuntimeError for a token that the grammar does not allow.
        """
        new = list(token_ids[self._num_seen :])
        self._num_seen = len(token_ids)
        if new and not self._matcher.consume_tokens(new):
            raise RuntimeError(f"the grammar stopped: {self._matcher.get_error():.300}")

    def masks_ahead(self, token_ids: Sequence[int], draft_token_ids: Sequence[int]) -> Iterator[np.ndarray | None]:
        """Yield the mask after `token_ids` and after each draft token that follows, in the layout of
        `apply_token_mask`. None behind the first draft token that the grammar does not allow: it will be rejected.
        """
        self.advance(token_ids)
        yield self._mask()
        num_consumed = 0
        for token in draft_token_ids:
            if num_consumed >= 0 and not self._matcher.is_stopped() and self._matcher.try_consume_tokens([token]):
                num_consumed += 1
                yield self._mask()
            else:
                yield None
        if num_consumed:
            self._matcher.rollback(num_consumed)

    def _mask(self) -> np.ndarray:
        return np.frombuffer(self._matcher.compute_bitmask(), "<i4", self._num_words)
