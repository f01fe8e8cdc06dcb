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


def append_sampled(
    sequence: Sequence,
    token_id: int,
    logprobs: TokenLogprobs | None = None,
    num_accepted: int = 0,
    num_rejected: int = 0,
) -> list[TokenOutput]:
    """Append a sampled token and those that the sequence's grammar adds; return an output for each of them.

    logprobs: of the token. The result is empty if the grammar drops the token and another one is sampled.
    """
    num_appended = sequence.append(token_id)
    if logprobs is not None and num_appended:
        sequence.logprobs.append(logprobs)
    outputs = _last_outputs(sequence, num_appended)
    if outputs:
        first = outputs[0]
        first.logprobs, first.num_accepted, first.num_rejected = logprobs, num_accepted, num_rejected
    return outputs


def restore(sequence: Sequence, token_ids: Series[int]) -> list[TokenOutput]:
    """Append output tokens that another engine generated. Return the outputs of tokens that follow without being
    sampled: that engine may have ended between two of them."""
    sequence.restore(token_ids)
    num_restored = len(sequence.token_ids)
    if token_ids:
        sequence.append_forced()
    return _last_outputs(sequence, len(sequence.token_ids) - num_restored)


def _last_outputs(sequence: Sequence, count: int) -> list[TokenOutput]:
    """Return the outputs of the last `count` tokens of the sequence, which were just appended."""
    size = len(sequence.token_ids)
    request_id, index = sequence.request_id, sequence.index
    outputs = [TokenOutput(request_id, index, token_id) for token_id in sequence.token_ids[size - count :]]
    if outputs and sequence.finish_reason is not None:
        last = outputs[-1]
        last.finish_reason = sequence.finish_reason
        last.completes_grammar = sequence.is_whole and last.token_id not in sequence.stop_token_ids
    if outputs and size - count == sequence.num_prompt_tokens:
        outputs[0].num_cached_tokens = sequence.num_cached_tokens or 0
        if sequence.params.prompt_logprobs is not None:
            outputs[0].prompt_logprobs = sequence.prompt_logprobs
    return outputs
