"""Draft tokens from the sequence itself: the tokens that followed an earlier occurrence of its last few tokens.

Prompt lookup decoding (Saxena 2023; LLMA, arXiv:2304.04487): answers that quote, edit or summarise repeat their prompt.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Series
from weakref import WeakKeyDictionary

from dispec.engine.execution.sampler import SamplerFunctions
from dispec.engine.scheduling.scheduler_output import SchedulerOutput
from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.speculation.proposer import Proposal

# Tokens that must match. Drafts that follow longer matches are accepted more often, so these are looked up first.
_MAX_MATCH, _MIN_MATCH = 4, 2


class NgramIndex:
    """The last position that follows each run of `_MIN_MATCH` to `_MAX_MATCH` tokens of one sequence.

    Costs three dictionary entries per token; a lookup costs the same however long the sequence is.
    """

    def __init__(self) -> None:
        self._following: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def propose(self, token_ids: Series[int], count: int) -> list[int]:
        """Return `count` tokens that may follow `token_ids`, which only grows between calls; none without a match."""
        for position in range(max(self._num_indexed, _MIN_MATCH), len(token_ids)):
            for size in range(_MIN_MATCH, min(_MAX_MATCH, position) + 1):
                self._following[tuple(token_ids[position - size : position])] = position
        self._num_indexed = len(token_ids)
        for size in range(min(_MAX_MATCH, len(token_ids)), _MIN_MATCH - 1, -1):
            start = self._following.get(tuple(token_ids[-size:]))
            if start is not None:
                period = len(token_ids) - start  # a match that reaches the end continues with itself
                return [token_ids[start + index % period] for index in range(count)]
        return []


class NgramProposer:
    """Proposes draft tokens from an n-gram index of each sequence."""

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()

    def prepare(self, sequence: Sequence, max_drafts: int) -> int:
        """Look the draft tokens up, up to the first that the sequence's grammar rejects, and return their number."""
        index = self._indices.setdefault(sequence, NgramIndex())
        drafts = index.propose(sequence.token_ids, max_drafts)
        if sequence.grammar is not None:
            del drafts[sequence.grammar.num_allowed(drafts) :]
        sequence.draft.token_ids = drafts
        return len(drafts)

    def num_missing_tokens(self, sequence: Sequence) -> int:
        """Return 0: a lookup needs no model."""
        return 0

    def propose(self, step: SchedulerOutput) -> Proposal:
        """Do nothing: `prepare` has set the draft tokens."""
        return Proposal()

    def compile_pieces(self, sampler: SamplerFunctions) -> Iterator[None]:
        """Do nothing: there is no model to compile."""
        return iter(())
