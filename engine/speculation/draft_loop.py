"""The draft loop: a draft model samples several draft tokens without the host between two of them.

The host writes the inputs of the first draft token; `layers.speculation.draft_step` computes each further one from the
one before it. On CUDA this step is compiled, a draft is a chain of CUDA graphs, and the target's step reads the draft
tokens from the device buffer to which the loop writes them. On a CPU whose kernels run whole layers, a draft is one C++
call (`ops.decode_tokens`), unless top-k, top-p or min-p is used.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dispec import ops
from dispec.engine.execution.compiled_steps import (
    begin_replay,
    compile_function,
    mark_inputs,
    replay_lock,
    root_cause,
    warn_about_eager_fallback,
)
from dispec.engine.execution.input_buffers import StepShape, host_views, input_views, write_inputs
from dispec.engine.execution.model_runner import ModelRunner
from dispec.engine.execution.pending_step import DeviceDrafts, write_drafts
from dispec.engine.execution.sampler import write_sampling_filters
from dispec.engine.execution.step_shapes import sequence_sizes
from dispec.engine.scheduling.scheduler_output import ScheduledSequence
from dispec.engine.scheduling.sequence import SamplingFeatures, Sequence
from dispec.layers.decoding import build_decoder
from dispec.layers.speculation import DraftState, draft_step
from dispec.layers.types import KVCache, SamplingFilters, Weights

# Tokens of a sequence that the draft model may not have computed: an accepted draft token and the token after it.
LAST_TOKENS = 2

_DraftStep = Callable[[Weights, DraftState, KVCache], tuple[Tensor, DraftState]]

_CHANGED_FIELDS = (
    "token_ids",
    "positions",
    "slot_mapping",
    "query_start",
    "context_lens",
    "logits_indices",
)  # of a batch, by a step
_EXTRA_FIELDS = 4  # last_positions, top_k, top_p, min_p
# No two sizes are equal, as in `engine.execution.step_shapes`.
_TRACED = StepShape(num_tokens=6, num_seqs=3, max_blocks_per_seq=5, num_sampled=3, query_len=LAST_TOKENS)
# One graph serves all sequences, because neutral sampling parameters change nothing.
_TRACED_FEATURES = SamplingFeatures.RANDOM | SamplingFeatures.TOP_K_TOP_P


def num_uncomputed_tokens(sequence: Sequence) -> int:
    """Return the number of the sequence's tokens that the draft model has not computed."""
    return len(sequence.token_ids) - sequence.draft.num_computed_tokens


def can_loop(sequence: Sequence) -> bool:
    """Return whether the device can sample the sequence's draft tokens alone: penalties and masks need the host."""
    return len(sequence.token_ids) >= LAST_TOKENS and not sequence.sampling_features & (
        SamplingFeatures.PENALTIES | SamplingFeatures.TOKEN_MASK
    )


class DraftLoop:
    """Draft loops for sequences of which the draft model has computed all but the last `LAST_TOKENS` tokens.

    runner: of the draft model. sampled: the token ids that the target's steps read, on the device.
    """

    def __init__(
        self, runner: ModelRunner, sampled: Tensor, max_num_seqs: int, max_num_draft_tokens: int, max_model_len: int
    ):
        self._runner = runner
        self._sampled = sampled
        self._max_num_draft_tokens = max_num_draft_tokens
        self._max_blocks = max(2, -(-max_model_len // runner.block_size))
        self._sizes = sequence_sizes(max_num_seqs)
        size = max(self._shape(self._sizes[-1]).size, _TRACED.size)
        extra = (_EXTRA_FIELDS, max(4, -(-self._sizes[-1] // 4) * 4))  # rows of whole 16 bytes
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=runner.is_cuda)
        self._host_extra = torch.zeros(extra, dtype=torch.int32, pin_memory=runner.is_cuda)
        self._inputs, self._extra = (
            (torch.zeros_like(host, device=runner.device) if runner.is_cuda else host)
            for host in (self._host, self._host_extra)
        )
        self._host_views = functools.lru_cache(256)(functools.partial(host_views, self._host))
        self._device_state = functools.lru_cache(256)(self._state)
        self._eager_step = self._step = _bound_step(runner)
        self._decoder: ops.Decoder | None = None
        if runner.plan.fuses_layers:
            model = runner.weights, runner.config, runner.vocabulary, runner.kv_cache
            self._decoder = build_decoder(*model, max_positions=max_model_len)

    @torch.inference_mode()
    def run(self, num_draft_tokens: dict[Sequence, int]) -> DeviceDrafts | None:
        """Draft the given number of tokens of each sequence.

        On CUDA, return drafts that the device is computing; else write them to the sequences' `draft.token_ids`.
        """
        # Sequences with most draft tokens come first: those with fewer are then the last rows.
        num_draft_tokens = dict(sorted(num_draft_tokens.items(), key=lambda item: -item[1]))
        sampling_features = 0
        for sequence in num_draft_tokens:
            sampling_features |= sequence.sampling_features
        if self._runner.plan.compile != "off" or self._runner.is_cuda:
            sampling_features = _TRACED_FEATURES
        if self._runner.is_cuda:
            started = torch.cuda.Event(enable_timing=True)
            started.record()
            with replay_lock():
                return DeviceDrafts(num_draft_tokens, self._loop(num_draft_tokens, sampling_features), started)
        if self._decoder is not None and not sampling_features & SamplingFeatures.TOP_K_TOP_P:
            is_random = bool(sampling_features & SamplingFeatures.RANDOM)
            write_drafts(num_draft_tokens, _decode(self._decoder, num_draft_tokens, is_random=is_random))
        else:
            write_drafts(num_draft_tokens, self._loop(num_draft_tokens, sampling_features))
        return None

    def compile(self) -> Iterator[None]:
        """Compile the step and record its chain of graphs, for one number of sequences at each `next`.

        The last `next` switches to the compiled step. If the compiler fails, warn and run eagerly.
        """
        try:
            step = _compiled_step(self._runner)
            for shape in (_TRACED, *map(self._shape, reversed(self._sizes))):
                # The first call of a chain warms its memory pool up, the second one records it.
                for _ in range(2 if self._runner.plan.replays else 1):
                    self._run_padding(step, shape)
                yield
            self._step = step
        except Exception as error:  # a compiler can fail in any way; the engine works without one
            warn_about_eager_fallback(root_cause(error))

    @torch.inference_mode()
    def _run_padding(self, step: _DraftStep, shape: StepShape) -> None:
        self._host[: shape.size] = 0
        write_inputs(self._host_views(shape), (), self._runner.block_size)
        self._upload(shape)
        self._draft(step, self._device_state(shape, _TRACED_FEATURES), self._max_num_draft_tokens)
        if self._runner.is_cuda:
            torch.cuda.synchronize(self._runner.device)  # before the next shape is written

    def _shape(self, size: int) -> StepShape:
        # Every sequence computes `LAST_TOKENS` tokens, some of them again: a uniform step is faster.
        return StepShape(LAST_TOKENS * size, size, self._max_blocks, size, LAST_TOKENS)

    def _loop(self, num_draft_tokens: dict[Sequence, int], sampling_features: int) -> Int[Tensor, "B K"]:
        """Return the draft tokens. K: the largest number of draft tokens of a sequence."""
        count, depth = len(num_draft_tokens), max(num_draft_tokens.values())
        if self._runner.is_cuda:
            shape = self._shape(next(size for size in self._sizes if size >= count))
        else:
            max_blocks = max(2, *(len(sequence.block_table) for sequence in num_draft_tokens))
            # The compiler specialises on a size of 1.
            size = count if self._runner.plan.compile == "off" else max(2, count)
            shape = self._shape(size)._replace(max_blocks_per_seq=max_blocks)
        scheduled = tuple(
            ScheduledSequence(each, len(each.token_ids) - LAST_TOKENS, LAST_TOKENS, samples=True)
            for each in num_draft_tokens
        )
        self._host[: shape.size] = 0
        write_inputs(self._host_views(shape), scheduled, self._runner.block_size)
        last, top_k = self._host_extra[:2].numpy()
        top_p, min_p = self._host_extra[2:].view(torch.float32).numpy()
        last[: shape.num_seqs] = 0
        last[:count] = [len(sequence.token_ids) + own - 2 for sequence, own in num_draft_tokens.items()]
        if sampling_features & SamplingFeatures.TOP_K_TOP_P:
            size = shape.num_seqs
            write_sampling_filters(
                list(num_draft_tokens),
                self._runner.vocabulary.num_head_tokens(self._runner.config),
                top_k[:size],
                top_p[:size],
                min_p[:size],
            )
        self._upload(shape)
        token_ids = self._draft(
            self._step,
            self._device_state(shape, sampling_features & (SamplingFeatures.RANDOM | SamplingFeatures.TOP_K_TOP_P)),
            depth,
        )
        # Without padding rows, for which the buffer that the target's steps read may have no room.
        sampled = self._sampled[: count * depth]
        sampled.copy_(token_ids[:count].flatten())
        return sampled.view(count, depth)

    def _upload(self, shape: StepShape) -> None:
        if self._runner.is_cuda:
            self._inputs[: shape.size].copy_(self._host[: shape.size], non_blocking=True)
            self._extra.copy_(self._host_extra, non_blocking=True)

    def _state(self, shape: StepShape, sampling_features: int) -> DraftState:
        """Return the inputs of a shape as the device reads them."""
        inputs = input_views(self._inputs, shape)
        last, top_k = self._extra[:2, : shape.num_seqs]
        top_p, min_p = self._extra[2:, : shape.num_seqs].view(torch.float32)
        filters = SamplingFilters(top_k, top_p, min_p)
        plan = self._runner.plan
        if plan.compile != "off":
            mark_inputs(inputs.batch, *inputs.sampling, last, *filters, replays=plan.replays)
        return DraftState(
            inputs.batch,
            last,
            inputs.sampling if sampling_features & SamplingFeatures.RANDOM else None,
            filters if sampling_features & SamplingFeatures.TOP_K_TOP_P else None,
        )

    def _draft(self, step: _DraftStep, state: DraftState, depth: int) -> Tensor:
        """Run a chain of steps, each on the state that the one before it returned. [B, depth]"""
        if self._runner.plan.replays and step is not self._eager_step:
            begin_replay()
        draft_tokens = []
        for _ in range(depth):
            token_ids, state = step(self._runner.weights, state, self._runner.kv_cache)
            draft_tokens.append(token_ids)
        return torch.stack(draft_tokens, 1)


def _bound_step(runner: ModelRunner) -> _DraftStep:
    config, vocabulary = runner.config, runner.vocabulary

    def step(weights: Any, state: Any, kv_cache: Any) -> tuple[Tensor, DraftState]:
        return draft_step(weights, config, vocabulary, state, kv_cache)

    return step


def _compiled_step(runner: ModelRunner) -> _DraftStep:
    """Return the step for states with sampling and filters, which is compiled when it is first called."""
    config, vocabulary = runner.config, runner.vocabulary

    def changed_fields(weights: Any, state: Any, kv_cache: Any) -> tuple[Any, ...]:
        token_ids, following = draft_step(weights, config, vocabulary, state, kv_cache)
        assert following.sampling is not None
        return token_ids, following.sampling.position, *(getattr(following.batch, name) for name in _CHANGED_FIELDS)

    run = compile_function(changed_fields, replays=runner.plan.replays)

    def step(weights: Weights, state: DraftState, kv_cache: KVCache) -> tuple[Tensor, DraftState]:
        # `run` returns plain tensors: the compiler of torch 2.11 breaks a named tuple within another one.
        token_ids, position, *fields = run(weights, state, kv_cache)
        assert state.sampling is not None
        return token_ids, state._replace(
            batch=state.batch._replace(**dict(zip(_CHANGED_FIELDS, fields, strict=True))),
            sampling=state.sampling._replace(position=position),
        )

    return step


def _decode(decoder: ops.Decoder, num_draft_tokens: dict[Sequence, int], *, is_random: bool) -> Int[Tensor, "B K"]:
    """Return the draft tokens, computed in one call. num_draft_tokens: in descending order."""
    # Every sequence computes as many tokens, some of them again: a uniform step is faster.
    query_len = LAST_TOKENS if any(num_uncomputed_tokens(sequence) > 1 for sequence in num_draft_tokens) else 1
    block_tables = np.zeros(
        (len(num_draft_tokens), max(2, *(len(each.block_table) for each in num_draft_tokens))), np.int32
    )
    for row, sequence in zip(block_tables, num_draft_tokens, strict=True):
        row[: len(sequence.block_table)] = sequence.block_table
    return ops.decode_tokens(
        decoder,
        torch.tensor(list(num_draft_tokens.values()), dtype=torch.int32),
        torch.tensor([sequence.token_ids[-query_len:] for sequence in num_draft_tokens], dtype=torch.int32),
        torch.from_numpy(block_tables),
        torch.tensor([len(sequence.token_ids) for sequence in num_draft_tokens], dtype=torch.int32),
        torch.tensor([sequence.params.temperature for sequence in num_draft_tokens], dtype=torch.float32)
        if is_random
        else None,
        torch.tensor([sequence.seed for sequence in num_draft_tokens], dtype=torch.int64) if is_random else None,
    )
