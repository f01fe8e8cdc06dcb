"""Guesses of a draft model, one after another, with the host's help for the first alone.

The host writes where each sequence stands; from then on each guess follows from the one before it where that was made.
On CUDA a loop of so many guesses for a bucket of sequences is one recorded graph, and the target's step reads the
guesses where the loop left them: the host hears of them with what the target says of them, in one transfer.
"""

import functools
import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from engine.compiled_model import mark_dynamic
from engine.runner import Runner
from engine.sequence import Needs, Sequence
from engine.step import Work
from engine.step_inputs import StepShape, batch_buckets, carve, fill
from engine.token_chooser import write_filters
from layers.config import ModelConfig
from layers.speculation import DraftState, draft_step, first_rows
from layers.types import Batch, Filters, KVCache, Weights

# Tokens of a sequence that the draft model may not have computed: a guess that stood, and what followed it.
_LAST_TOKENS = 2
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
    """A loop's inputs on the host, and on the device if that is another: a step's, and what only guessing needs."""

    inputs: Tensor
    extra: Tensor


class DraftLoop:
    """Guesses for sequences of which the draft model has computed all but the last two tokens.

    runner: of the draft model. target: of the model that verifies. head_tokens: as in `draft_step`.
    """

    def __init__(
        self,
        config: ModelConfig,
        runner: Runner,
        target: Runner,
        vocab_size: int,
        head_tokens: Tensor | None,
        max_num_seqs: int,
        max_num_drafts: int,
        max_model_len: int,
    ) -> None:
        self._config = config
        self._runner = runner
        self._chosen = target.chosen
        self._vocab_size = vocab_size
        self._head_tokens = head_tokens
        self._num_columns = len(head_tokens) if head_tokens is not None else min(vocab_size, config.vocab_size)
        self._max_num_drafts = max_num_drafts
        self._max_blocks = max(2, -(-max_model_len // runner.block_size))
        self._buckets = batch_buckets(max_num_seqs)
        largest = self._shape(self._buckets[-1], _LAST_TOKENS, self._max_blocks)
        self._host = _Buffers(
            torch.zeros(sum(largest.field_sizes()), dtype=torch.int32, pin_memory=runner.is_cuda),
            torch.zeros((_EXTRA_FIELDS, -(-self._buckets[-1] // 4) * 4), dtype=torch.int32, pin_memory=runner.is_cuda),
        )
        self._device = _Buffers(*(buffer.to(runner.device) for buffer in self._host)) if runner.is_cuda else self._host
        self._host_inputs = functools.lru_cache(256)(functools.partial(carve, self._host.inputs))
        self._device_inputs = functools.lru_cache(256)(functools.partial(carve, self._device.inputs))
        self._step = _step
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def can_guess(self, sequence: Sequence) -> bool:
        """Whether nothing that a choice of it depends on is known to the host alone."""
        return len(sequence.token_ids) >= _LAST_TOKENS and not sequence.needs & (Needs.EDIT | Needs.MASK)

    @torch.inference_mode()
    def run(self, depths: dict[Sequence, int]) -> Guesses | None:
        """Guess so many tokens of each sequence.

        On CUDA the guesses are under way when this returns; else they are in `draft_token_ids` already.
        """
        # Those with most guesses first, so that the others can be left out when they have theirs.
        depths = dict(sorted(depths.items(), key=lambda item: -item[1]))
        started = torch.cuda.Event(enable_timing=True) if self._runner.is_cuda else None
        if started is not None:
            started.record()
        state, size = self._prepare(depths)
        for sequence, count in depths.items():
            sequence.num_drafter_tokens = len(sequence.token_ids) + count - 1
        depth = max(depths.values())
        if started is not None:
            if (graph := self._graphs.get((size, depth))) is not None:
                graph.replay()
            else:
                self._launch(state, depth)
            found = self._chosen[: size * depth].view(size, depth)[: len(depths)]
            return Guesses(depths, found, started)
        guesses: list[list[int]] = []
        for place in range(depth):
            guessing = sum(count > place for count in depths.values())
            if guessing < len(state.batch.context_lens):
                state = first_rows(state, guessing)
            token_ids, state = self._once(state)
            guesses.append(token_ids.tolist())
        for row, (sequence, count) in enumerate(depths.items()):
            sequence.draft_token_ids = [guesses[place][row] for place in range(count)]
        return None

    def compile(self) -> Iterator[None]:
        """On CUDA: compile a step and record every loop, a bucket of sequences at each `next`."""
        self._step = torch.compile(_step, fullgraph=True)
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._buckets):
            with torch.inference_mode():
                self._host.inputs.zero_()
                shape = self._shape(size, _LAST_TOKENS, self._max_blocks)
                fill(self._host_inputs(shape), (), self._runner.block_size, {})
                state = self._upload(shape)
                self._launch(state, self._max_num_drafts, is_traced=True)
                torch.cuda.synchronize()
                for depth in range(self._max_num_drafts, 0, -1):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        self._launch(state, depth)
                    self._graphs[size, depth] = graph
            yield

    def _shape(self, size: int, query_len: int, width: int) -> StepShape:
        return StepShape(query_len * size, size, width, size, query_len)

    def _prepare(self, depths: dict[Sequence, int]) -> tuple[DraftState, int]:
        """Write the inputs of the first guesses; the number of sequences with those of padding."""
        # One more token than was missing is computed again: a uniform step is that much faster.
        is_behind = any(len(sequence.token_ids) - sequence.num_drafter_tokens > 1 for sequence in depths)
        query_len = _LAST_TOKENS if is_behind or self._runner.is_cuda else 1
        works = [Work(sequence, len(sequence.token_ids) - query_len, query_len, samples=True) for sequence in depths]
        size, width = len(works), self._max_blocks
        if self._runner.is_cuda:
            size = next(bucket for bucket in self._buckets if bucket >= size)
        else:
            width = max(2, *(len(sequence.block_table) for sequence in depths))
        shape = self._shape(size, query_len, width)
        self._host.inputs[: sum(shape.field_sizes())] = 0
        fill(self._host_inputs(shape), tuple(works), self._runner.block_size, {})
        last, top_k = self._host.extra[:2].numpy()
        top_p, min_p = self._host.extra[2:].view(torch.float32).numpy()
        last[:size] = 0
        last[: len(depths)] = [len(sequence.token_ids) + count - 2 for sequence, count in depths.items()]
        needs = functools.reduce(operator.or_, (sequence.needs for sequence in depths))
        # On CUDA one graph has to serve all.
        draws, restricts = (self._runner.is_cuda or bool(needs & need) for need in (Needs.DRAW, Needs.RESTRICT))
        if restricts:
            write_filters(list(depths), self._num_columns, top_k[:size], top_p[:size], min_p[:size])
        return self._upload(shape, draws=draws, restricts=restricts), size

    def _upload(self, shape: StepShape, *, draws: bool = True, restricts: bool = True) -> DraftState:
        if self._runner.is_cuda:
            used = sum(shape.field_sizes())
            self._device.inputs[:used].copy_(self._host.inputs[:used], non_blocking=True)
            self._device.extra.copy_(self._host.extra, non_blocking=True)
        inputs = self._device_inputs(shape)
        last, top_k = self._device.extra[:2, : shape.sequences]
        top_p, min_p = self._device.extra[2:, : shape.sequences].view(torch.float32)
        filters = Filters(top_k, top_p, min_p) if restricts else None
        return DraftState(inputs.batch, inputs.sampling, last, draws, filters)

    def _once(self, state: DraftState) -> tuple[Tensor, DraftState]:
        runner = self._runner
        token_ids, *following = self._step(
            runner.weights, self._config, state, runner.kv_cache, self._vocab_size, self._head_tokens
        )
        return token_ids, _restored(state, following)

    def _launch(self, state: DraftState, depth: int, *, is_traced: bool = False) -> None:
        """All guesses of all sequences on CUDA, into the rows that the target's step reads."""
        found = []
        for _ in range(depth):
            if is_traced:
                mark_dynamic(*state.batch, *state.sampling, state.last_positions, *(state.filters or ()))
            token_ids, state = self._once(state)
            found.append(token_ids)
        self._chosen[: len(found[0]) * depth].copy_(torch.stack(found, 1).flatten())


def _step(
    weights: Weights,
    config: ModelConfig,
    state: DraftState,
    kv_cache: KVCache,
    vocab_size: int,
    head_tokens: Tensor | None,
) -> tuple[Tensor, ...]:
    """The guesses and what changed: the compiler does not give back a state of states with plain values in it."""
    token_ids, state = draft_step(weights, config, state, kv_cache, vocab_size, head_tokens)
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
