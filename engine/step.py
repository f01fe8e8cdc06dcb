"""What the scheduler and the runner say to each other: work to do, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from engine.sequence import FinishReason, Sequence, TokenLogprobs


class Work(NamedTuple):
    """Tokens `start` … `start + num_tokens - 1` of a sequence, to be computed.

    samples: whether the last of them is the sequence's last, so that the next token can be chosen.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool


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
    """What a step chose, by sequence id: of each sequence that samples its next token, and what it asked for besides.

    prompt_logprobs: of the tokens after each of those that the step computed, as far as they are in the prompt.
    """

    token_ids: Mapping[int, int]
    logprobs: Mapping[int, TokenLogprobs] = MappingProxyType({})
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What a step did to one sequence: a new token, and maybe its end; an end alone if the engine failed."""

    sequence: Sequence
    token_id: int | None
    finish_reason: FinishReason | None
