"""The work that the scheduler gives the runner, and the results that come back."""

from collections.abc import Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from dispec.engine.scheduling.sequence import FinishReason, Sequence, TokenLogprobs


class ScheduledSequence(NamedTuple):
    """Tokens `start` … `start + num_tokens - 1` of a sequence, to be computed.

    samples: whether the last of them is the sequence's last, so that the next token can be sampled.
    num_drafts: how many of them, the last ones, are draft tokens: the first of the sequence's `draft.token_ids`. Then a
        token is sampled before the first draft token and after each.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    num_drafts: int = 0

    @property
    def num_sampled(self) -> int:
        """Number of positions that are sampled, after accepted and rejected draft tokens alike."""
        return self.num_drafts + 1 if self.samples else 0

    @property
    def draft_token_ids(self) -> list[int]:
        """Draft tokens among those that it computes or follows, in order."""
        return self.sequence.draft.token_ids[: max(0, self.start + self.num_tokens - len(self.sequence.token_ids))]


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


class TokenOutput(msgspec.Struct, array_like=True):
    """A new token of one choice of a request, as the scheduler commits it and the server receives it.

    index: of the choice. logprobs: of the token, where asked for.
    num_cached_tokens, prompt_logprobs: of the prompt, with the choice's first token; the latter without the first
        prompt token's.
    num_accepted, num_rejected: draft tokens of the choice in this step, with the step's first token.
    """

    request_id: str
    index: int
    token_id: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_accepted: int = 0
    num_rejected: int = 0


def last_token_output(
    sequence: Sequence, logprobs: TokenLogprobs | None = None, num_accepted: int = 0, num_rejected: int = 0
) -> TokenOutput:
    """Return the output for the sequence's last token, which was just appended."""
    output = TokenOutput(
        sequence.request_id,
        sequence.index,
        sequence.token_ids[-1],
        sequence.finish_reason,
        logprobs,
        num_accepted=num_accepted,
        num_rejected=num_rejected,
    )
    if sequence.num_output_tokens == 1:
        output.num_cached_tokens = sequence.num_cached_tokens or 0
        if sequence.params.prompt_logprobs is not None:
            output.prompt_logprobs = sequence.prompt_logprobs
    return output
