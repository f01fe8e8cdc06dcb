"""What a step's inputs say, padding included."""

import pytest
import torch

from dispec.engine.execution.input_buffers import StepShape, host_views, input_views, write_inputs
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.scheduler_output import ScheduledSequence
from dispec.engine.scheduling.sequence import Sequence

pytestmark = pytest.mark.smoke


def prompt_of(length: int, block_table: list[int]) -> ScheduledSequence:
    sequence = Sequence(
        id=block_table[0],
        token_ids=list(range(100, 100 + length)),
        params=SamplingParams(temperature=0.7),
        seed=block_table[0],
        stop_token_ids=frozenset(),
        max_len=64,
        arrival_time=0.0,
    )
    sequence.block_table.extend(block_table)
    return ScheduledSequence(sequence, 0, length, True)


def test_the_padding_of_a_ragged_step_belongs_to_no_sequence_of_a_full_step() -> None:
    shape = StepShape(num_tokens=64, num_seqs=2, max_blocks_per_seq=1, num_sampled=2, query_len=None)
    buffer = torch.zeros(shape.size, dtype=torch.int32)
    inputs = input_views(buffer, shape)
    scheduled = (prompt_of(3, [5]), prompt_of(4, [7]))
    assert write_inputs(host_views(buffer, shape), scheduled, 16) == list(scheduled)
    batch = inputs.batch
    assert batch.query_start.tolist() == [0, 3, 7]
    assert batch.context_lens.tolist() == [3, 4]
    assert batch.slot_mapping.tolist() == [80, 81, 82, 112, 113, 114, 115] + [0] * 57
    assert batch.logits_indices.tolist() == [2, 6]


def test_a_uniform_step_with_a_row_for_each_token_selects_none() -> None:
    """Rows of a token whose logits are not wanted belong to no work; so do those of padding."""
    shape = StepShape(num_tokens=9, num_seqs=3, max_blocks_per_seq=2, num_sampled=9, query_len=3)
    buffer = torch.zeros(shape.size, dtype=torch.int32)
    inputs = input_views(buffer, shape)
    prompt, verified = prompt_of(3, [5]), prompt_of(18, [7, 9])
    verified.sequence.draft.token_ids = [61, 62]
    verified = verified._replace(start=17, num_tokens=3, num_draft_tokens=2)
    sampled = write_inputs(host_views(buffer, shape), (prompt, verified), 16)
    assert sampled == [None, None, prompt, verified, verified, verified]
    batch, sampling = inputs.batch, inputs.sampling
    assert batch.logits_indices is None
    assert batch.token_ids.tolist() == [100, 101, 102, 117, 61, 62, 0, 0, 0]
    assert batch.query_start.tolist() == [0, 3, 6, 9]
    assert batch.context_lens.tolist() == [3, 20, 3]
    assert sampling.position.tolist() == [1, 2, 3, 18, 19, 20, 0, 0, 0]
    assert [round(value, 3) for value in sampling.temperature.tolist()] == [0, 0, 0.7, 0.7, 0.7, 0.7, 0, 0, 0]
    assert sampling.seed.tolist() == [0, 0, 5, 7, 7, 7, 0, 0, 0]


def test_draft_tokens_on_the_device_are_read_where_they_lie() -> None:
    shape = StepShape(num_tokens=3, num_seqs=1, max_blocks_per_seq=2, num_sampled=3, query_len=3)
    buffer = torch.zeros(shape.size, dtype=torch.int32)
    inputs = input_views(buffer, shape)
    scheduled = prompt_of(18, [7, 9])
    scheduled.sequence.draft.token_ids = [0, 0]  # so many, not yet known
    write_inputs(
        host_views(buffer, shape),
        (scheduled._replace(start=17, num_tokens=3, num_draft_tokens=2),),
        16,
        draft_index={7: 10},
    )
    assert inputs.batch.token_ids.tolist() == [117, 0, 0]
    assert inputs.previous_indices.tolist() == [0, 11, 12]


def test_a_spare_sequence_of_a_ragged_step_is_empty() -> None:
    shape = StepShape(num_tokens=8, num_seqs=4, max_blocks_per_seq=1, num_sampled=1, query_len=None)
    buffer = torch.zeros(shape.size, dtype=torch.int32)
    inputs = input_views(buffer, shape)
    write_inputs(host_views(buffer, shape), (prompt_of(3, [5]),), 16)
    assert inputs.batch.query_start.tolist() == [0, 3, 3, 3, 3]
    assert inputs.batch.context_lens.tolist() == [3, 0, 0, 0]


def test_a_decode_step_reads_each_token_from_the_host_or_from_the_device() -> None:
    """The host knows the tokens of the first and third sequence; a step under way samples that of the second."""
    shape = StepShape(num_tokens=4, num_seqs=4, max_blocks_per_seq=3, num_sampled=4, query_len=1)
    buffer = torch.zeros(shape.size, dtype=torch.int32)
    inputs = input_views(buffer, shape)
    first, pending, third = prompt_of(3, [5]), prompt_of(32, [7, 9, 4]), prompt_of(17, [8, 6])
    scheduled = (
        first._replace(start=2, num_tokens=1),
        pending._replace(start=32, num_tokens=1),
        third._replace(start=16, num_tokens=1),
    )
    assert write_inputs(host_views(buffer, shape), scheduled, 16, sampled_index={7: 2}) == list(scheduled)
    batch, sampling = inputs.batch, inputs.sampling
    assert batch.token_ids.tolist() == [102, 0, 116, 0]
    assert inputs.previous_indices.tolist() == [0, 3, 0, 0]
    assert batch.positions.tolist() == [2, 32, 16, 0]
    assert batch.slot_mapping.tolist() == [5 * 16 + 2, 4 * 16, 6 * 16, 0]
    assert batch.block_tables.tolist() == [[5, 0, 0], [7, 9, 4], [8, 6, 0], [0, 0, 0]]
    assert batch.query_start.tolist() == [0, 1, 2, 3, 4]
    assert batch.context_lens.tolist() == [3, 33, 17, 1]
    assert sampling.position.tolist() == [3, 33, 17, 0]
    assert sampling.seed.tolist() == [5, 7, 8, 0]
