"""What a step's inputs say, padding included."""

import torch

from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.step import Work
from engine.step_inputs import StepShape, carve, fill


def prompt_of(length: int, block_table: list[int]) -> Work:
    sequence = Sequence(
        id=block_table[0],
        token_ids=list(range(100, 100 + length)),
        params=SamplingParams(),
        seed=0,
        stop_token_ids=frozenset(),
        max_len=64,
        arrival_time=0.0,
    )
    sequence.block_table.extend(block_table)
    return Work(sequence, 0, length, True)


def test_the_padding_of_a_ragged_step_is_nobodys_even_where_every_sequence_is_taken() -> None:
    shape = StepShape(tokens=64, sequences=2, blocks=1, rows=2, query_len=None)
    inputs = carve(torch.zeros(sum(shape.field_sizes()), dtype=torch.int32), shape)
    work = (prompt_of(3, [5]), prompt_of(4, [7]))
    assert fill(inputs, work, 16, {}) == list(work)
    batch = inputs.batch
    assert batch.query_start.tolist() == [0, 3, 7]
    assert batch.context_lens.tolist() == [3, 4]
    assert batch.slot_mapping.tolist() == [80, 81, 82, 112, 113, 114, 115] + [0] * 57
    assert batch.logits_indices.tolist() == [2, 6]


def test_a_spare_sequence_of_a_ragged_step_is_empty() -> None:
    shape = StepShape(tokens=8, sequences=4, blocks=1, rows=1, query_len=None)
    inputs = carve(torch.zeros(sum(shape.field_sizes()), dtype=torch.int32), shape)
    fill(inputs, (prompt_of(3, [5]),), 16, {})
    assert inputs.batch.query_start.tolist() == [0, 3, 3, 3, 3]
    assert inputs.batch.context_lens.tolist() == [3, 0, 0, 0]
