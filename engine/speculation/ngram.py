"""Guesses from the sequence itself: what came after its last few tokens when they were there before.

Prompt lookup decoding (Saxena 2023; LLMA, arXiv:2304.04487): answers that quote, edit or summarise repeat their prompt.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must match: longer matches are right more often, and are looked for first


class NgramIndex:
    """Where each run of `SHORTEST` to `LONGEST` tokens of one sequence was last followed by another token.

    Costs a few dictionary entries for each token, once; a lookup costs the same however long the sequence is.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}
        self._num_seen = 0

    def propose(self, token_ids: Sequence[int], count: int) -> list[int]:
        """`count` tokens that may follow `token_ids`, which only ever grows between calls; none without a match."""
        for position in range(max(self._num_seen, SHORTEST), len(token_ids)):
            for size in range(SHORTEST, min(LONGEST, position) + 1):
                self._next[tuple(token_ids[position - size : position])] = position
        self._num_seen = len(token_ids)
        for size in range(min(LONGEST, len(token_ids)), SHORTEST - 1, -1):
            found = self._next.get(tuple(token_ids[-size:]))
            if found is not None:
                period = len(token_ids) - found  # a match that reaches the end goes on with itself
                return [token_ids[found + index % period] for index in range(count)]
        return []
