"""A step's inputs as one flat buffer: written on the host, copied to the device in one transfer.

    seed | temperature | sample_position | token_ids | previous_indices | positions | slot_mapping | query_start | …

Each field starts at a multiple of 16 bytes, because Inductor copies inputs at other addresses.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
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


Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass(frozen=True)
class StepInputs(Generic[Array]):
    """The inputs of a step, in the order of the buffer: numpy arrays on the host, tensors for the model.

    Fields are those of `layers.types.Sampling`, `layers.steps.PreviousTokens` and `layers.types.Batch`.
    flat: all of them, as int32.
    """

    flat: Array
    seed: Array
    temperature: Array
    sample_position: Array
    token_ids: Array
    previous_indices: Array
    positions: Array
    slot_mapping: Array
    query_start: Array
    context_lens: Array
    block_tables: Array
    logits_indices: Array | None
    query_len: int | None

    @property
    def batch(self: "StepInputs[Tensor]") -> Batch:
        return Batch(
            self.token_ids,
            self.positions,
            self.slot_mapping,
            self.block_tables,
            self.query_start,
            self.context_lens,
            self.logits_indices,
        )

    @property
    def sampling(self: "StepInputs[Tensor]") -> Sampling:
        return Sampling(self.temperature, self.seed, self.sample_position)


def input_views(buffer: Tensor, shape: StepShape) -> StepInputs[Tensor]:
    """Return views of an int32 buffer as the inputs of a step.

    Each is a tensor with a storage of its own over the buffer's memory: the compiler guards on storage offsets, which
    would differ between shapes. A uniform step that samples at each of its tokens has no `logits_indices`.
    """
    num_tokens, num_seqs, max_blocks_per_seq, num_sampled, query_len = shape
    flat = buffer[: shape.size]
    fields = flat.split(shape.field_sizes())
    seed, temperature, sample_position, token_ids, previous, positions, slots, starts, contexts, tables, indices = (
        from_dlpack(to_dlpack(field)) for field in fields
    )
    return StepInputs(
        flat=flat,
        seed=seed[: 2 * num_sampled].view(torch.int64),
        temperature=temperature[:num_sampled].view(torch.float32),
        sample_position=sample_position[:num_sampled],
        token_ids=token_ids[:num_tokens],
        previous_indices=previous[:num_tokens],
        positions=positions[:num_tokens],
        slot_mapping=slots[:num_tokens],
        query_start=starts[: num_seqs + 1],
        context_lens=contexts[:num_seqs],
        block_tables=tables[: num_seqs * max_blocks_per_seq].view(num_seqs, max_blocks_per_seq),
        logits_indices=None if query_len is not None and num_sampled == num_tokens else indices[:num_sampled],
        query_len=query_len,
    )


def host_views(buffer: Tensor, shape: StepShape) -> StepInputs[np.ndarray]:
    """Return `input_views` of a buffer on the host as numpy arrays."""
    inputs = input_views(buffer, shape)
    arrays = {name: field.numpy() for name, field in vars(inputs).items() if isinstance(field, Tensor)}
    return StepInputs(**vars(inputs) | arrays)


class HostBuffer:
    """A step's inputs and samples on the host. The device may still be using those of one step while the next are
    written.

    size: int32 elements of the inputs. num_sampled: most samples.
    """

    def __init__(self, size: int, num_sampled: int, *, is_pinned: bool) -> None:
        self.token_ids = torch.zeros(num_sampled, dtype=torch.int64, pin_memory=is_pinned)
        self.flat = torch.zeros(size, dtype=torch.int32, pin_memory=is_pinned)
        # Shapes recur, and making the views takes as long as the rest of a step's preparation.
        self._views = functools.lru_cache(256)(functools.partial(host_views, self.flat))
        self._copied = torch.cuda.Event() if is_pinned else None

    def zeroed(self, shape: StepShape) -> StepInputs[np.ndarray]:
        """Wait until the device has read the buffer's last inputs, and return zeroed ones."""
        if self._copied is not None:
            self._copied.synchronize()
        inputs = self._views(shape)
        inputs.flat[:] = 0
        return inputs

    def copy_to(self, destination: Tensor, stream: torch.cuda.Stream | None) -> None:
        """Start the copy of the first elements to the device. stream: the current one, if it is known."""
        destination.copy_(self.flat[: len(destination)], non_blocking=True)
        assert self._copied is not None
        self._copied.record(stream)


def write_inputs(
    inputs: StepInputs[np.ndarray],
    scheduled: tuple[ScheduledSequence, ...],
    block_size: int,
    sampled_index: Mapping[int, int] = MappingProxyType({}),
    draft_index: Mapping[int, int] = MappingProxyType({}),
) -> list[ScheduledSequence | None]:
    """Write scheduled sequences to zeroed inputs. What stays zero is harmless: token 0 in block 0, greedy.

    sampled_index, draft_index: by sequence id, the place of its next token and of its first draft token among the
        previous tokens on the device. They are read for tokens that the host does not know.
    Returns the sequence of each row of logits, in order; None for a row whose sample is not used. A sequence that
    samples has a row, and one more for each draft token. In a uniform step the other sequences have a row, too; without
    `logits_indices` every token has one.
    """
    _write_token_ids(inputs, scheduled, sampled_index, draft_index)
    _write_block_tables(inputs.block_tables, scheduled)
    if inputs.query_len == 1:
        _write_decode_positions(inputs, scheduled, block_size)
    else:
        _write_positions(inputs, scheduled, block_size)
    return _write_sampling(inputs, scheduled)


def _write_token_ids(
    inputs: StepInputs[np.ndarray],
    scheduled: tuple[ScheduledSequence, ...],
    sampled_index: Mapping[int, int],
    draft_index: Mapping[int, int],
) -> None:
    token_ids: list[int] = []
    previous_indices: list[int] = []  # up to the last token that is on the device
    for item in scheduled:
        sequence, start, num_tokens, _, _ = item
        own = sequence.token_ids
        num_unknown = start + num_tokens - len(own)
        if num_unknown <= 0:
            token_ids += own[start : start + num_tokens]
            continue
        if num_unknown < num_tokens:
            token_ids += own[start:]
        if len(previous_indices) < len(token_ids):
            previous_indices += [0] * (len(token_ids) - len(previous_indices))
        if not sequence.draft.token_ids:
            token_ids.append(0)
            previous_indices.append(sampled_index[sequence.id] + 1)
            continue
        drafts = item.draft_token_ids[-min(num_unknown, num_tokens) :]
        token_ids += drafts
        if sequence.id in draft_index:
            first = draft_index[sequence.id] + 1
            previous_indices += range(first, first + len(drafts))
    inputs.token_ids[: len(token_ids)] = token_ids
    inputs.previous_indices[: len(previous_indices)] = previous_indices


def _write_block_tables(block_tables: np.ndarray, scheduled: tuple[ScheduledSequence, ...]) -> None:
    # Slices of memoryviews are copied in 0.07 us, rows of numpy arrays in 0.3 us, and lists element by element.
    flat, width = block_tables.reshape(-1).data, block_tables.shape[1]
    for row, item in enumerate(scheduled):
        block_table = item.sequence.block_table
        flat[row * width : row * width + len(block_table)] = block_table


def _write_decode_positions(
    inputs: StepInputs[np.ndarray], scheduled: tuple[ScheduledSequence, ...], block_size: int
) -> None:
    """Write what `_write_positions` does for one token of each sequence, in fewer operations."""
    num_seqs = len(scheduled)
    inputs.positions[:num_seqs] = [item.start for item in scheduled]
    inputs.slot_mapping[:num_seqs] = [
        item.sequence.block_table[item.start // block_size] * block_size + item.start % block_size for item in scheduled
    ]
    inputs.query_start[:] = np.arange(len(inputs.query_start))
    # A padding sequence attends to itself alone, in the padding block.
    np.add(inputs.positions, 1, out=inputs.context_lens)


def _write_positions(inputs: StepInputs[np.ndarray], scheduled: tuple[ScheduledSequence, ...], block_size: int) -> None:
    """Write positions, slots, and where each sequence's tokens and context end."""
    query_start, context_lens = inputs.query_start, inputs.context_lens
    num_seqs = len(scheduled)
    starts = np.array([item.start for item in scheduled], np.int32)
    counts = [item.num_tokens for item in scheduled]
    num_tokens = sum(counts)
    query_start[1 : num_seqs + 1] = np.cumsum(counts)
    context_lens[:num_seqs] = starts + counts
    if num_tokens == num_seqs:
        owners, positions = np.arange(num_seqs), starts
    else:
        owners = np.repeat(np.arange(num_seqs), counts)
        positions = np.arange(num_tokens) + (starts - query_start[:num_seqs])[owners]
    inputs.positions[:num_tokens] = positions
    block_ids = inputs.block_tables[owners, positions // block_size]
    inputs.slot_mapping[:num_tokens] = slots_of(block_ids, positions, block_size)
    if num_seqs == len(context_lens):
        return
    if inputs.query_len is not None:
        # A padding sequence attends to itself alone, in the padding block.
        first, step = num_tokens + inputs.query_len, inputs.query_len
        query_start[num_seqs + 1 :] = np.arange(first, len(inputs.positions) + 1, step)
        context_lens[num_seqs:] = inputs.query_len
    else:
        # Padding tokens belong to no sequence: all sequences may be taken, and no block table has room for all padding.
        query_start[num_seqs + 1 :] = num_tokens


def _write_sampling(
    inputs: StepInputs[np.ndarray], scheduled: tuple[ScheduledSequence, ...]
) -> list[ScheduledSequence | None]:
    """Write the positions that are sampled from and their parameters. Return the sequence of each row."""
    rows: list[ScheduledSequence | None] = []
    tokens: list[int] = []
    end = 0
    for item in scheduled:
        end += item.num_tokens
        if item.num_tokens == 1 and item.samples:  # the usual case
            rows.append(item)
            tokens.append(end - 1)
            continue
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
    temperatures = [0.0 if item is None else item.sequence.params.temperature for item in rows]
    if any(temperatures):  # greedy rows need no random numbers
        inputs.temperature[:size] = temperatures
        inputs.seed[:size] = [0 if item is None else item.sequence.seed for item in rows]
        inputs.sample_position[:size] = inputs.positions[tokens] + 1
    return rows
