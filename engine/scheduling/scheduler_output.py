"""Types between the scheduler and the model runner: scheduled sequences in, sampled tokens out."""

from collections.abc import Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.scheduling.token_output import TokenLogprobs, TokenOutput


class ScheduledSequence(NamedTuple):
    """Tokens `start` … `start + num_tokens - 1` of a sequence, to be computed in a step.

    samples: whether they end with the sequence's last known token, so that the next token is sampled.
    num_draft_tokens: draft tokens among them, the last ones. The position before the first draft token and the position
        of each are sampled from.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    num_draft_tokens: int = 0

    @property
    def num_sampled(self) -> int:
        """Number of positions that are sampled."""
        return self.num_draft_tokens + 1 if self.samples else 0

    @property
    def draft_token_ids(self) -> list[int]:
        """The sequence's draft tokens before the end of this step's tokens.

        These are the draft tokens that a step verifies; in a step of the draft model, those that it has sampled so far.
        """
        return self.sequence.draft.token_ids[: max(0, self.start + self.num_tokens - len(self.sequence.token_ids))]


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The work of one step; empty when nothing can run.

    copies: (source, destination) blocks to copy before the step.
    num_cached_tokens: tokens of admitted sequences that were found in the cache.
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
    """The result of a step, by sequence id, for the sequences that sample or have prompt log-probabilities.

    token_ids: accepted draft tokens and the token after them. logprobs: of these tokens, where asked for.
    prompt_logprobs: of each prompt token that follows a computed one.
    """

    token_ids: Mapping[int, Series[int]]
    logprobs: Mapping[int, Series[TokenLogprobs]] = MappingProxyType({})
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = MappingProxyType({})


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
        completes_grammar=sequence.finish_reason == "stop" and sequence.token_ids[-1] not in sequence.stop_token_ids,
    )
    if sequence.num_output_tokens == 1:
        output.num_cached_tokens = sequence.num_cached_tokens or 0
        if sequence.params.prompt_logprobs is not None:
            output.prompt_logprobs = sequence.prompt_logprobs
    return output
