"""The shapes that steps are padded to: each has room for its step, and little padding."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispec.engine.execution.execution_plan import ExecutionPlan
from dispec.engine.execution.input_buffers import StepShape
from dispec.engine.execution.step_shapes import TRACED_DECODE, TRACED_PREFILL, StepShapes, sequence_sizes, token_sizes

CUDA = ExecutionPlan(
    device="cuda",
    compile="startup",
    replays=True,
    fuses_layers=False,
    mixes=True,
    max_query_len=6,
    overlaps=True,
    reads_device_tokens=True,
)
CPU = replace(CUDA, device="cpu", replays=False, max_query_len=16, overlaps=False, reads_device_tokens=False)
MAX_BLOCKS = 4
MAX_NUM_DRAFTS = CUDA.max_query_len - 1


def shapes(plan: ExecutionPlan, max_num_seqs: int, max_tokens: int) -> StepShapes:
    return StepShapes(
        plan,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        max_num_draft_tokens=MAX_NUM_DRAFTS,
        max_blocks_per_seq=MAX_BLOCKS,
        max_query_len=plan.max_query_len,
    )


def fits(exact: StepShape, shape: StepShape) -> bool:
    """Whether a step of the exact shape can run in the other."""
    is_same_kind = exact.query_len == shape.query_len
    return is_same_kind and all(size <= room for size, room in zip(exact[:4], shape[:4], strict=True))


@st.composite
def cases(draw: st.DrawFn, plan: ExecutionPlan) -> tuple[int, int, StepShape]:
    """Limits of an engine (sequences, tokens), and the exact shape of a step within them."""
    max_num_seqs = draw(st.integers(1, 300))
    max_tokens = draw(st.integers(max_num_seqs, 20_000))
    sequences, blocks = draw(st.integers(1, max_num_seqs)), draw(st.integers(1, MAX_BLOCKS))
    if draw(st.booleans()):
        query_len = draw(st.integers(1, min(plan.max_query_len, max_tokens // sequences)))
        tokens = sequences * query_len
        # Prompts of as many tokens have a row each, draft tokens one more.
        exact = StepShape(tokens, sequences, blocks, draw(st.sampled_from([sequences, tokens])), query_len)
    else:
        tokens = draw(st.integers(sequences, max_tokens))
        rows = draw(st.integers(0, min(tokens, sequences * (1 + MAX_NUM_DRAFTS))))
        exact = StepShape(tokens, sequences, blocks, rows, None)
    return max_num_seqs, max_tokens, exact


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("plan", [CUDA, CPU], ids=["cuda", "cpu"])
@given(data=st.data())
def test_a_step_fits_its_shape_and_the_shape_the_buffers(
    plan: ExecutionPlan, is_compiled: bool, data: st.DataObject
) -> None:
    max_num_seqs, max_tokens, exact = data.draw(cases(plan))
    found = shapes(plan, max_num_seqs, max_tokens)
    shape = found.padded(exact, is_compiled=is_compiled)
    assert fits(exact, shape)
    if shape.query_len is not None:
        assert shape.num_tokens == shape.num_seqs * shape.query_len
    if is_compiled:
        assert shape.query_len is None or shape.num_sampled == shape.num_tokens, "selecting rows is another graph"
        assert min(shape[:4]) > 1, "the compiler would specialise"
    assert shape.size <= found.largest.size
    assert shape.num_sampled <= found.largest.num_sampled
    if plan is CUDA and is_compiled:
        assert shape in found.recorded()


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 64, 100, 1000])
@pytest.mark.parametrize("max_tokens", [1, 40, 512, 8192, 10_000])
def test_recorded_shapes_fall_and_the_largest_has_room_for_all(max_num_seqs: int, max_tokens: int) -> None:
    found = shapes(CUDA, max_num_seqs, max(max_tokens, max_num_seqs))
    recorded = found.recorded()
    assert [shape.num_tokens for shape in recorded] == sorted((shape.num_tokens for shape in recorded), reverse=True)
    assert len(recorded) == len(set(recorded))
    for shape in (*recorded, TRACED_DECODE, TRACED_PREFILL):
        assert shape.size <= found.largest.size
        assert shape.num_sampled <= found.largest.num_sampled


@pytest.mark.parametrize("most", [32, 48, 1000, 4096, 5000, 8192, 30_000])
def test_ragged_steps_have_little_padding(most: int) -> None:
    sizes = token_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for tokens in range(33, most + 1):
        size = next(size for size in sizes if size >= tokens)
        assert size <= tokens * (1.5 if tokens <= 4096 else 1.125)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 17, 100, 256, 1000])
def test_sizes_of_uniform_steps_end_at_the_most_sequences(most: int) -> None:
    sizes = sequence_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 2
    assert sizes[-1] == max(2, most)
    assert all(size <= 2 * sequences for sequences in range(2, most + 1) for size in [next_of(sizes, sequences)])


def next_of(sizes: list[int], size: int) -> int:
    return next(own for own in sizes if own >= size)


def test_traced_sizes_differ_and_none_is_one() -> None:
    """Two that are equal would be one to the compiler."""
    decode, prefill = TRACED_DECODE, TRACED_PREFILL
    for shape in (decode, prefill):
        sizes = [shape.num_tokens, shape.num_seqs, shape.max_blocks_per_seq]
        assert len(set(sizes)) == len(sizes)
        assert min(*sizes, shape.num_sampled) > 1
    assert decode.query_len == decode.num_tokens // decode.num_seqs > 1
    assert prefill.num_sampled not in (prefill.num_tokens, prefill.num_seqs, prefill.max_blocks_per_seq)
