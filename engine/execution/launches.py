"""How a scheduled step is split into launches: passes of the model over some of its sequences."""

from typing import NamedTuple

from dispec.engine.execution.input_buffers import StepShape
from dispec.engine.scheduling.scheduler_output import ScheduledSequence
from dispec.engine.scheduling.sequence import SamplingFeatures


class Launch(NamedTuple):
    """One pass of the model. shape: without padding."""

    scheduled: tuple[ScheduledSequence, ...]
    shape: StepShape


def split_step(scheduled: tuple[ScheduledSequence, ...], max_query_len: int, *, mixes: bool) -> list[Launch]:
    """Return the launches of a step: one, or without `mixes` one of decodes and one of prompts.

    A step is uniform if all sequences have equally many tokens, at most `max_query_len`, and sample: it decodes, or
    verifies as many draft tokens of each sequence. Decodes need not sample.
    """
    if not scheduled:
        return []
    query_len = scheduled[0].num_tokens
    if (
        query_len <= max_query_len
        and all(item.num_tokens == query_len for item in scheduled)
        and (query_len == 1 or all(item.samples for item in scheduled))
        and not any(_has_prompt_logprobs(item) for item in scheduled)
    ):
        return [_launch(scheduled, query_len)]
    if mixes:
        return [_launch(scheduled, None)]
    decodes = tuple(item for item in scheduled if item.num_tokens == 1 and not _has_prompt_logprobs(item))
    prompts = tuple(item for item in scheduled if item.num_tokens > 1 or _has_prompt_logprobs(item))
    return [_launch(items, query_len) for items, query_len in ((decodes, 1), (prompts, None)) if items]


def _has_prompt_logprobs(item: ScheduledSequence) -> bool:
    """Return whether the step has log-probabilities of the sequence's prompt, which only ragged steps return."""
    sequence = item.sequence
    return item.start < sequence.num_prompt_tokens - 1 and bool(
        sequence.sampling_features & SamplingFeatures.PROMPT_LOGPROBS
    )


def _launch(scheduled: tuple[ScheduledSequence, ...], query_len: int | None) -> Launch:
    num_seqs = len(scheduled)
    num_tokens = sum([item.num_tokens for item in scheduled]) if query_len is None else num_seqs * query_len
    shape = StepShape(
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        max_blocks_per_seq=max(2, *[len(item.sequence.block_table) for item in scheduled]),
        num_sampled=sum([item.num_sampled for item in scheduled]) if query_len != 1 else num_seqs,
        query_len=query_len,
    )
    return Launch(scheduled, shape)
