"""A step's inputs as one flat buffer: written on the host, copied to the device in one transfer.

    seed | temperature | sample_position | token_ids | previous_indices | positions | slot_mapping | query_start | …

Each field starts at a multiple of 16 bytes, because Inductor copies an input whose address is not.
"""

import functools
from collections.abc import Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from dispec.engine.scheduling.scheduler_output import ScheduledSequence
from dispec.layers.types import Batch, Sampling, slots_of

_ALIGNMENT = 4  # int32 elements, 16 bytes


class StepShape(NamedTuple):
    """The sizes of a step's inputs. query_len: tokens of each sequence in a uniform step, None in a ragged one."""

    num_tokens: int
    num_seqs: int
    max_blocks_per_seq: int
    num_sampled: int
    query_len: int | None

    @property
    def size(self) -> int:
        """Return the elements of int32 of all fields."""
        return sum(self.field_sizes())

    def field_sizes(self) -> tuple[int, ...]:
        """Return the elements of int32 of each field, in the order of `input_views`."""
        num_tokens, num_seqs, num_sampled = self.num_tokens, self.num_seqs, self.num_sampled
        fields = (
            *(2 * num_sampled, num_sampled, num_sampled),  # seed is int64
            *(num_tokens, num_tokens, num_tokens, num_tokens),
            *(num_seqs + 1, num_seqs, num_seqs * self.max_blocks_per_seq),
            num_sampled,
        )
        return tuple(-(-size // _ALIGNMENT) * _ALIGNMENT for size in fields)


class StepInputs(NamedTuple):
    """The inputs of a step. previous_indices: as `indices` of `layers.steps.PreviousTokens`."""

    batch: Batch
    sampling: Sampling
    previous_indices: Int[Tensor, "T"]


def input_views(buffer: Tensor, shape: StepShape) -> StepInputs:
    """Return views of an int32 buffer as the inputs of a step.

    Each is a tensor with a storage of its own over the buffer's memory: the compiler guards on storage offsets, which
    would differ between shapes. A uniform step that samples at each of its tokens has no `logits_indices`.
    """
    samples_all_tokens = shape.query_len is not None and shape.num_sampled == shape.num_tokens
    fields = buffer[: shape.size].split(shape.field_sizes())
    seed, temperature, sample_position, token_ids, previous, positions, slots, starts, contexts, tables, indices = (
        from_dlpack(to_dlpack(field)) for field in fields
    )
    batch = Batch(
        token_ids=token_ids[: shape.num_tokens],
        positions=positions[: shape.num_tokens],
        slot_mapping=slots[: shape.num_tokens],
        block_tables=tables[: shape.num_seqs * shape.max_blocks_per_seq].view(shape.num_seqs, shape.max_blocks_per_seq),
        query_start=starts[: shape.num_seqs + 1],
        context_lens=contexts[: shape.num_seqs],
        logits_indices=None if samples_all_tokens else indices[: shape.num_sampled],
        query_len=shape.query_len,
    )
    sampling = Sampling(
        temperature=temperature[: shape.num_sampled].view(torch.float32),
        seed=seed[: 2 * shape.num_sampled].view(torch.int64),
        position=sample_position[: shape.num_sampled],
    )
    return StepInputs(batch, sampling, previous[: shape.num_tokens])


class HostInputs(NamedTuple):
    """The inputs of a step as numpy arrays over a host buffer."""

    token_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    block_tables: np.ndarray
    query_start: np.ndarray
    context_lens: np.ndarray
    logits_indices: np.ndarray | None
    previous_indices: np.ndarray
    temperature: np.ndarray
    seed: np.ndarray
    sample_position: np.ndarray
    query_len: int | None


def host_views(buffer: Tensor, shape: StepShape) -> HostInputs:
    """Return `input_views` of a buffer on the host as numpy arrays."""
    batch, sampling, previous_indices = input_views(buffer, shape)
    fields = (*batch[:7], previous_indices, *sampling)
    return HostInputs(*(None if field is None else field.numpy() for field in fields), batch.query_len)  # type: ignore


class HostBuffer:
    """A step's inputs on the host. The device may still be reading those of one step while the next are written."""

    def __init__(self, size: int, *, is_pinned: bool) -> None:
        self.flat = torch.zeros(size, dtype=torch.int32, pin_memory=is_pinned)
        # Shapes recur, and making the views takes as long as the rest of a step's preparation.
        self._views = functools.lru_cache(256)(functools.partial(host_views, self.flat))
        self._copied = torch.cuda.Event() if is_pinned else None

    def zeroed(self, shape: StepShape) -> HostInputs:
        """Wait until the device has read the buffer's last inputs, and return zeroed ones."""
        if self._copied is not None:
            self._copied.synchronize()
        self.flat[: shape.size] = 0
        return self._views(shape)

    def copy_to(self, device_buffer: Tensor, size: int) -> None:
        """Start the copy of the first `size` elements to the device."""
        device_buffer[:size].copy_(self.flat[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def write_inputs(
    inputs: HostInputs,
    scheduled: tuple[ScheduledSequence, ...],
    block_size: int,
    sampled_index: Mapping[int, int] = MappingProxyType({}),
    draft_index: Mapping[int, int] = MappingProxyType({}),
) -> list[ScheduledSequence | None]:
    """Write scheduled sequences to zeroed inputs. What stays zero is harmless: token 0 in block 0, greedy.

    sampled_index, draft_index: by sequence id, the place of its next token and of its first draft token among the
        previous tokens on the device. They are read for tokens that the host does not know.
    Returns the sequence of each sampled row, in order; None for a row whose sample is not used. Every sequence of a
    uniform step has a row, or every token; of a ragged step only sequences that sample. Each draft token has one more.
    """
    _write_token_ids(inputs, scheduled, sampled_index, draft_index)
    _write_positions(inputs, scheduled, block_size)
    return _write_sampling(inputs, scheduled)


def _write_token_ids(
    inputs: HostInputs,
    scheduled: tuple[ScheduledSequence, ...],
    sampled_index: Mapping[int, int],
    draft_index: Mapping[int, int],
) -> None:
    token_ids: list[int] = []
    for item in scheduled:
        sequence = item.sequence
        end = len(token_ids) + item.num_tokens
        token_ids += sequence.token_ids[item.start : item.start + item.num_tokens]
        if (num_known := len(token_ids)) == end:
            continue
        drafts = item.draft_token_ids
        if not drafts:
            inputs.previous_indices[num_known] = sampled_index[sequence.id] + 1
        elif sequence.id in draft_index:
            first = draft_index[sequence.id] + 1
            inputs.previous_indices[num_known:end] = range(first, first + end - num_known)
        token_ids += drafts[num_known - end :] or [0]
    inputs.token_ids[: len(token_ids)] = token_ids


def _write_positions(inputs: HostInputs, scheduled: tuple[ScheduledSequence, ...], block_size: int) -> None:
    """Write positions, block tables, slots, and where each sequence's tokens and context end."""
    query_start, context_lens = inputs.query_start, inputs.context_lens
    num_seqs, counts = len(scheduled), [item.num_tokens for item in scheduled]
    num_tokens = sum(counts)
    query_start[1 : num_seqs + 1] = list(accumulate(counts))
    context_lens[:num_seqs] = [item.start + item.num_tokens for item in scheduled]
    for row, item in zip(inputs.block_tables, scheduled, strict=False):
        block_table = item.sequence.block_table
        row[: len(block_table)] = block_table
    tokens = np.arange(num_tokens)
    owners = tokens if num_tokens == num_seqs else np.repeat(np.arange(num_seqs), counts)
    # The last token of a sequence is the last one of its context.
    positions = tokens + (context_lens - query_start[1:])[owners]
    inputs.positions[:num_tokens] = positions
    block_ids = inputs.block_tables[owners, positions // block_size]
    inputs.slot_mapping[:num_tokens] = slots_of(block_ids, positions, block_size)
    if inputs.query_len is not None:
        # A padding sequence attends to itself alone, in the padding block.
        query_start[num_seqs + 1 :] = range(num_tokens + inputs.query_len, len(inputs.positions) + 1, inputs.query_len)
        context_lens[num_seqs:] = inputs.query_len
    else:
        # Padding tokens belong to no sequence: all sequences may be taken, and no block table has room for all padding.
        query_start[num_seqs + 1 :] = num_tokens


def _write_sampling(inputs: HostInputs, scheduled: tuple[ScheduledSequence, ...]) -> list[ScheduledSequence | None]:
    """Write the tokens that are sampled after, and how. Return the sequence of each row."""
    rows: list[ScheduledSequence | None] = []
    tokens: list[int] = []
    end = 0
    for item in scheduled:
        end += item.num_tokens
        num_rows = item.num_sampled or (0 if inputs.query_len is None else 1)
        first = end - num_rows
        if inputs.logits_indices is None:
            first = end - item.num_tokens
            rows += [None] * (item.num_tokens - num_rows)
        rows += [item if item.samples else None] * num_rows
        tokens += range(first, end)
    size = len(rows)
    if inputs.logits_indices is not None:
        inputs.logits_indices[:size] = tokens
    inputs.temperature[:size] = [0.0 if item is None else item.sequence.params.temperature for item in rows]
    inputs.seed[:size] = [0 if item is None else item.sequence.seed for item in rows]
    inputs.sample_position[:size] = inputs.positions[tokens] + 1 if size else 0
    return rows
