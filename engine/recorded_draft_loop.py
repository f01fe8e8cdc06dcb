"""Guesses of a draft model on CUDA, one after another, with the host's help for the first alone.

The host writes where each sequence stands; from then on each guess follows from the one before it on the device. A loop
of so many guesses for a bucket of sequences is one recorded graph, and the target's step reads the guesses where the
loop left them: the host hears of them with what the target says of them, in one transfer.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from engine.compiled_model import mark_dynamic
from engine.draft_loop import LAST_TOKENS, Guesser
from engine.runner import Runner
from engine.sequence import Sequence
from engine.step import Work
from engine.step_inputs import StepShape, batch_buckets, carve, fill
from engine.token_chooser import write_filters
from layers.config import ModelConfig
from layers.speculation import DraftState, advance, guess
from layers.types import Batch, Filters, KVCache, Weights

_EXTRA_FIELDS = 4  # last_positions, top_k, top_p, min_p


class Guesses:
    """Guesses that the device is making, of sequences whose `draft_token_ids` only say how many they are.

    rows: the first row, of those that the target's step reads, of each sequence's guesses, by sequence id.
    """

    def __init__(self, depths: dict[Sequence, int], found: Tensor, started: torch.cuda.Event) -> None:
        size, depth = found.shape
        self.rows = {sequence.id: row * depth for row, sequence in enumerate(depths)}
        self._depths = depths
        self._found = torch.empty((size, depth), dtype=found.dtype, pin_memory=True)
        self._found.copy_(found, non_blocking=True)
        self._started, self._ended = started, torch.cuda.Event(enable_timing=True)
        self._ended.record()
        for sequence, count in depths.items():
            sequence.draft_token_ids = [0] * count

    def wait(self) -> float:
        """Tell the sequences what was guessed; the seconds that it took the device."""
        self._ended.synchronize()
        for (sequence, count), tokens in zip(self._depths.items(), self._found.tolist(), strict=True):
            sequence.draft_token_ids = tokens[:count]
        return 1e-3 * self._started.elapsed_time(self._ended)


class _Buffers(NamedTuple):
    """A loop's inputs: a step's, and what only guessing needs."""

    inputs: Tensor
    extra: Tensor


class _Start(NamedTuple):
    """Where a loop begins. last_positions: as in `advance`."""

    state: DraftState
    last_positions: Tensor


class RecordedDraftLoop:
    """Guesses for sequences of which the draft model has computed all but the last two tokens.

    target: of the model that verifies. It works wherever its tensors are, but only on CUDA is anything recorded.
    """

    def __init__(
        self, guesser: Guesser, target: Runner, max_num_seqs: int, max_num_drafts: int, max_model_len: int
    ) -> None:
        self._guesser = guesser
        self._runner = runner = guesser.runner
        self._chosen = target.chosen
        self._max_num_drafts = max_num_drafts
        self._max_blocks = max(2, -(-max_model_len // runner.block_size))
        self._buckets = batch_buckets(max_num_seqs)
        largest = self._shape(self._buckets[-1])
        self._host = _Buffers(
            torch.zeros(sum(largest.field_sizes()), dtype=torch.int32, pin_memory=runner.is_cuda),
            torch.zeros((_EXTRA_FIELDS, -(-self._buckets[-1] // 4) * 4), dtype=torch.int32, pin_memory=runner.is_cuda),
        )
        self._device = _Buffers(*(torch.zeros_like(buffer, device=runner.device) for buffer in self._host))
        self._host_inputs = functools.lru_cache(256)(functools.partial(carve, self._host.inputs))
        self._device_inputs = functools.lru_cache(256)(functools.partial(carve, self._device.inputs))
        self._step = _step
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def run(self, depths: dict[Sequence, int]) -> Guesses:
        """Guess so many tokens of each sequence. The guesses are under way when this returns."""
        started = torch.cuda.Event(enable_timing=True)
        started.record()
        return Guesses(depths, self.launch(depths), started)

    @torch.inference_mode()
    def launch(self, depths: dict[Sequence, int]) -> Tensor:
        """The same without saying so: a row of guesses of each sequence, as many as the one with most has."""
        start, size = self._prepare(depths)
        depth = max(depths.values())
        if (graph := self._graphs.get((size, depth))) is not None:
            graph.replay()
        else:
            self._launch(start, depth)
        return self._chosen[: size * depth].view(size, depth)[: len(depths)]

    def compile(self) -> Iterator[None]:
        """Compile a step and record every loop, a bucket of sequences at each `next`."""
        self._step = torch.compile(_step, fullgraph=True)
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._buckets):
            with torch.inference_mode():
                self._host.inputs.zero_()
                shape = self._shape(size)
                fill(self._host_inputs(shape), (), self._runner.block_size, {})
                start = self._upload(shape)
                self._launch(start, self._max_num_drafts, is_traced=True)
                torch.cuda.synchronize()
                for depth in range(self._max_num_drafts, 0, -1):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        self._launch(start, depth)
                    self._graphs[size, depth] = graph
            yield

    def _shape(self, size: int) -> StepShape:
        # One more token than may be missing is computed again: a uniform step is that much faster.
        return StepShape(LAST_TOKENS * size, size, self._max_blocks, size, LAST_TOKENS)

    def _prepare(self, depths: dict[Sequence, int]) -> tuple[_Start, int]:
        """Write the inputs of the first guesses; the number of sequences with those of padding."""
        works = [
            Work(sequence, len(sequence.token_ids) - LAST_TOKENS, LAST_TOKENS, samples=True) for sequence in depths
        ]
        size = next(bucket for bucket in self._buckets if bucket >= len(works))
        shape = self._shape(size)
        self._host.inputs[: sum(shape.field_sizes())] = 0
        fill(self._host_inputs(shape), tuple(works), self._runner.block_size, {})
        last, top_k = self._host.extra[:2].numpy()
        top_p, min_p = self._host.extra[2:].view(torch.float32).numpy()
        last[:size] = 0
        last[: len(depths)] = [len(sequence.token_ids) + count - 2 for sequence, count in depths.items()]
        # One graph has to serve all: they are drawn, and restricted, whether anybody wants it or not.
        write_filters(list(depths), self._guesser.num_columns, top_k[:size], top_p[:size], min_p[:size])
        return self._upload(shape), size

    def _upload(self, shape: StepShape) -> _Start:
        used = sum(shape.field_sizes())
        self._device.inputs[:used].copy_(self._host.inputs[:used], non_blocking=True)
        self._device.extra.copy_(self._host.extra, non_blocking=True)
        inputs = self._device_inputs(shape)
        last, top_k = self._device.extra[:2, : shape.sequences]
        top_p, min_p = self._device.extra[2:, : shape.sequences].view(torch.float32)
        return _Start(DraftState(inputs.batch, inputs.sampling, True, Filters(top_k, top_p, min_p)), last)

    def _launch(self, start: _Start, depth: int, *, is_traced: bool = False) -> None:
        """All guesses of all sequences, into the rows that the target's step reads."""
        guesser, runner = self._guesser, self._runner
        state, last_positions = start
        found = []
        for _ in range(depth):
            if is_traced:
                mark_dynamic(*state.batch, *state.sampling, last_positions, *(state.filters or ()))
            token_ids, *following = self._step(
                runner.weights,
                guesser.config,
                state,
                last_positions,
                runner.kv_cache,
                guesser.vocab_size,
                guesser.head_tokens,
            )
            state = _restored(state, following)
            found.append(token_ids)
        self._chosen[: len(found[0]) * depth].copy_(torch.stack(found, 1).flatten())


def _step(
    weights: Weights,
    config: ModelConfig,
    state: DraftState,
    last_positions: Tensor,
    kv_cache: KVCache,
    vocab_size: int,
    head_tokens: Tensor | None,
) -> tuple[Tensor, ...]:
    """The guesses and what changed: the compiler does not give back a state of states with plain values in it."""
    token_ids = guess(weights, config, state, kv_cache, vocab_size, head_tokens)
    state = advance(state, token_ids, last_positions, kv_cache[0].keys.shape[3])
    batch = state.batch
    return (
        token_ids,
        batch.token_ids,
        batch.positions,
        batch.slot_mapping,
        batch.query_start,
        batch.context_lens,
        state.sampling.position,
    )


def _restored(state: DraftState, following: list[Tensor]) -> DraftState:
    token_ids, positions, slot_mapping, query_start, context_lens, sample_position = following
    batch = Batch(
        token_ids,
        positions,
        slot_mapping,
        state.batch.block_tables,
        query_start,
        context_lens,
        query_start[:-1],
        query_len=1,
    )
    return state._replace(batch=batch, sampling=state.sampling._replace(position=sample_position))
