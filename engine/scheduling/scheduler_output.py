"""The work that the scheduler gives the runner, and the results that come back."""

from collections.abc import Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from dispec.engine.scheduling.sequence import FinishReason, Sequence, TokenLogprobs


class ScheduledSequence(NamedTuple):
    """Tokens `start` … `start + num_tokens - 1` of a sequence, to be computed.

    samples: whether the last of them is the sequence's last, so that the next token can be sampled.
    num_drafts: how many of them, the last ones, are draft tokens: the first of the sequence's `draft_token_ids`. Then a
        token is sampled before the first draft token and after each.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    num_drafts: int = 0

    @property
    def num_rows(self) -> int:
        """Number of positions that are sampled, after accepted and rejected draft tokens alike."""
        return self.num_drafts + 1 if self.samples else 0

    @property
    def guesses(self) -> list[int]:
        """Draft tokens among those that it computes or follows, in order."""
        return self.sequence.draft_token_ids[: max(0, self.start + self.num_tokens - len(self.sequence.token_ids))]


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """What one pass of the model computes; empty when nothing can run.

    copies: (source, destination) blocks to copy before anything is computed.
    num_cached_tokens: found in the cache by the sequences that this step admits.
    """

    scheduled_sequences: tuple[ScheduledSequence, ...]
    copies: tuple[tuple[int, int], ...] = ()
    num_preempted: int = 0
    num_admitted: int = 0
    num_cached_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(scheduled.num_tokens for scheduled in self.scheduled_sequences)


class ModelRunnerOutput(NamedTuple):
    """What a step sampled, by the id of each sequence that samples, with the logprobs that it asked for.

    token_ids: the accepted draft tokens and the token after them.
    prompt_logprobs: of each prompt token that follows one that the step computed.
    """

    token_ids: Mapping[int, Series[int]]
    logprobs: Mapping[int, Series[TokenLogprobs]] = MappingProxyType({})
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """A new token of one sequence, with the sequence's end where it has ended; an end alone if the engine failed.

    number: the token's in the sequence's output, from 1.
    num_accepted, num_rejected: draft tokens of the sequence in this step, in the output of its first token.
    """

    sequence: Sequence
    token_id: int | None
    finish_reason: FinishReason | None
    number: int = 0
    num_accepted: int = 0
    num_rejected: int = 0
