"""A step's inputs as one flat buffer: written once on the host, copied to the device in one transfer.

    seed | temperature | sample_position | token_ids | token_source | positions | slot_mapping | query_start | …

Each field starts at a multiple of 16 bytes, because Inductor copies an input whose address is not.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from dispec.engine.scheduling.scheduler_output import ScheduledSequence
from dispec.layers.types import Batch, Sampling

_ALIGNMENT = 4  # int32 elements, 16 bytes


class StepShape(NamedTuple):
    """The sizes of a step's inputs: tokens, sequences, blocks per sequence, rows with logits."""

    tokens: int
    sequences: int
    blocks: int
    rows: int
    query_len: int | None

    @property
    def size(self) -> int:
        """Elements of int32 of all fields."""
        return sum(self.field_sizes())

    def field_sizes(self) -> tuple[int, ...]:
        """Elements of int32 that each field takes, in the order of `input_views`."""
        tokens, sequences, rows = self.tokens, self.sequences, self.rows
        fields = (
            2 * rows,
            rows,
            rows,
            tokens,
            tokens,
            tokens,
            tokens,
            sequences + 1,
            sequences,
            sequences * self.blocks,
            rows,
        )
        return tuple(-(-size // _ALIGNMENT) * _ALIGNMENT for size in fields)


class StepInputs(NamedTuple):
    """What a step reads. token_source: as `source` of `layers.steps.PreviousTokens`."""

    batch: Batch
    sampling: Sampling
    token_source: Int[Tensor, "T"]


def input_views(buffer: Tensor, shape: StepShape) -> StepInputs:
    """Views of an int32 buffer as the inputs of a step.

    Each is a tensor with a storage of its own over the buffer's memory: the compiler guards on storage offsets, and
    those of views would differ from one shape to the next. A uniform step that has a row for each token does not select
    any.
    """
    has_all_rows = shape.query_len is not None and shape.rows == shape.tokens
    views = buffer[: shape.size].split(shape.field_sizes())
    seed, temperature, sample_position, token_ids, source, positions, slots, starts, contexts, tables, rows = (
        from_dlpack(to_dlpack(view)) for view in views
    )
    batch = Batch(
        token_ids=token_ids[: shape.tokens],
        positions=positions[: shape.tokens],
        slot_mapping=slots[: shape.tokens],
        block_tables=tables[: shape.sequences * shape.blocks].view(shape.sequences, shape.blocks),
        query_start=starts[: shape.sequences + 1],
        context_lens=contexts[: shape.sequences],
        logits_indices=None if has_all_rows else rows[: shape.rows],
        query_len=shape.query_len,
    )
    sampling = Sampling(
        temperature=temperature[: shape.rows].view(torch.float32),
        seed=seed[: 2 * shape.rows].view(torch.int64),
        position=sample_position[: shape.rows],
    )
    return StepInputs(batch, sampling, source[: shape.tokens])


def write_inputs(
    inputs: StepInputs,
    scheduled: tuple[ScheduledSequence, ...],
    block_size: int,
    pending_rows: Mapping[int, int] = MappingProxyType({}),
    draft_rows: Mapping[int, int] = MappingProxyType({}),
) -> list[ScheduledSequence | None]:
    """Write `work` to zeroed host inputs; rows beyond it stay as harmless padding: token 0 in block 0, greedy.

    pending_rows, draft_rows: by sequence id, the place of its next token, and of the first of its draft tokens, among
    the tokens on the device; of those that the host knows the first is of no account. Returns the work whose next token
    each row chooses, in order; None for a row whose token is not wanted. A uniform step has a row for every sequence or
    every token, a ragged one only for those that sample; a work with drafts has one more for each.
    """
    batch, sampling = inputs.batch, inputs.sampling
    token_ids, positions, slots = batch.token_ids.numpy(), batch.positions.numpy(), batch.slot_mapping.numpy()
    sources, starts, contexts = inputs.token_source.numpy(), batch.query_start.numpy(), batch.context_lens.numpy()
    tables = batch.block_tables.numpy()
    rows = None if batch.logits_indices is None else batch.logits_indices.numpy()
    temperature, seed, sample_position = (
        field.numpy() for field in (sampling.temperature, sampling.seed, sampling.position)
    )
    token = 0
    sampled: list[ScheduledSequence | None] = []
    for index, item in enumerate(scheduled):
        sequence, first, num_tokens = item.sequence, item.start, item.num_tokens
        table = sequence.block_table
        if num_tokens == 1:
            if first < len(sequence.token_ids):
                token_ids[token] = sequence.token_ids[first]
            elif guesses := item.draft_token_ids:
                token_ids[token] = guesses[-1]
            else:
                sources[token] = pending_rows[sequence.id] + 1
            positions[token] = first
            slots[token] = table[first // block_size] * block_size + first % block_size
        else:
            last = token + num_tokens
            guesses = item.draft_token_ids
            token_ids[token : last - len(guesses)] = sequence.token_ids[first : first + num_tokens]
            if guesses and sequence.id in draft_rows:
                row = draft_rows[sequence.id] + 1
                sources[last - len(guesses) : last] = range(row, row + len(guesses))
            else:
                token_ids[last - len(guesses) : last] = guesses
            positions[token:last] = range(first, first + num_tokens)
        tables[index, : len(table)] = table
        if num_tokens > 1:
            at = positions[token : token + num_tokens]
            slots[token : token + num_tokens] = tables[index, at // block_size] * block_size + at % block_size
        token += num_tokens
        starts[index + 1] = token
        contexts[index] = first + num_tokens
        if item.samples or batch.query_len is not None:
            count = max(1, item.num_sampled)
            if rows is None:
                sampled += [None] * (num_tokens - count)
            row = len(sampled)
            of_work = slice(row, row + count)
            if rows is not None:
                rows[of_work] = range(token - count, token)
            temperature[of_work] = sequence.params.temperature
            seed[of_work] = sequence.seed
            sample_position[of_work] = range(first + num_tokens - count + 1, first + num_tokens + 1)
            sampled += [item if item.samples else None] * count
    if batch.query_len is not None:
        # A padding sequence attends to itself alone, in the padding block.
        starts[len(scheduled) + 1 :] = range(token + batch.query_len, len(token_ids) + 1, batch.query_len)
        contexts[len(scheduled) :] = batch.query_len
    else:
        # Padding tokens are nobody's: there may be as many sequences as there is room for, and no block table has room
        # for a whole step's padding.
        starts[len(scheduled) + 1 :] = token
    return sampled
