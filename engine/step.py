"""What the scheduler and the runner say to each other: work to do, and what came of it."""

from collections.abc import Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from engine.sequence import FinishReason, Sequence, TokenLogprobs


class Work(NamedTuple):
    """Tokens `start` … `start + num_tokens - 1` of a sequence, to be computed.

    samples: whether the last of them is the sequence's last, so that the next token can be chosen.
    num_drafts: how many of them, the last ones, are guesses: the first of the sequence's `draft_token_ids`. Then a
        token is chosen after each guess and before the first.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    num_drafts: int = 0

    @property
    def num_rows(self) -> int:
        """Tokens that are chosen, right or wrong."""
        return self.num_drafts + 1 if self.samples else 0

    @property
    def guesses(self) -> list[int]:
        """Guessed tokens among those that it computes or follows, in order."""
        return self.sequence.draft_token_ids[: max(0, self.start + self.num_tokens - len(self.sequence.token_ids))]


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass of the model computes; empty when nothing can run.

    copies: (source, destination) blocks to copy before anything is computed.
    num_cached_tokens: found in the cache by the sequences that this step admits.
    """

    work: tuple[Work, ...]
    copies: tuple[tuple[int, int], ...] = ()
    num_preempted: int = 0
    num_admitted: int = 0
    num_cached_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(work.num_tokens for work in self.work)


class StepResult(NamedTuple):
    """What a step chose, by sequence id: of each sequence that samples, and what it asked for besides.

    token_ids: those of its drafts that are the tokens that would have been chosen anyhow, and the one after them.
    prompt_logprobs: of the tokens after each of those that the step computed, as far as they are in the prompt.
    """

    token_ids: Mapping[int, Series[int]]
    logprobs: Mapping[int, Series[TokenLogprobs]] = MappingProxyType({})
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What a step did to one sequence: a new token, and maybe its end; an end alone if the engine failed.

    number: the token's in the sequence's output, from 1. num_right and num_wrong: guesses of the sequence in this step
    that stood and that did not, told with its first token of the step.
    """

    sequence: Sequence
    token_id: int | None
    finish_reason: FinishReason | None
    number: int = 0
    num_right: int = 0
    num_wrong: int = 0
