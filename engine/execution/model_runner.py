"""Runs steps on the device, and owns its weights, KV cache and step inputs.

Each step is one call of a pure function of `layers.steps`, eager or compiled as the `ExecutionPlan` says. Compiled
functions are traced, and on CUDA recorded, before they are used. Sampling beyond the argmax is separate (`Sampler`), so
that a step runs only what it uses.
"""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dispec import ops
from dispec.engine.execution.compiled_steps import (
    begin_replay,
    compiled_steps,
    eager_steps,
    mark_dynamic,
    mark_inputs,
    mark_static,
    replay_lock,
    root_cause,
    warn_about_eager_fallback,
)
from dispec.engine.execution.execution_plan import ExecutionPlan
from dispec.engine.execution.input_buffers import (
    HostBuffer,
    StepInputs,
    StepShape,
    input_views,
    write_inputs,
)
from dispec.engine.execution.launches import split_step
from dispec.engine.execution.pending_step import DeviceDrafts, PendingStep
from dispec.engine.execution.ranks import ComputeLogits, CopyBlocks, Ranks, RunStep
from dispec.engine.execution.sampler import Sampler, SamplerFunctions, compiled_functions, warm_up_calls
from dispec.engine.execution.sampler_output import SamplerOutput
from dispec.engine.execution.step_shapes import TRACED_DECODE, TRACED_PREFILL, StepShapes
from dispec.engine.machine.compile_cache import choose_compile_cache
from dispec.engine.scheduling.scheduler_output import ModelRunnerOutput, ScheduledSequence, SchedulerOutput
from dispec.layers.config import ModelConfig
from dispec.layers.decoding import build_decoder
from dispec.layers.steps import PreviousTokens, Vocabulary, head
from dispec.layers.types import KVCache, Weights


class _Outputs(NamedTuple):
    """hidden: of all tokens of a ragged step, [T, E]. logits, argmax: of the sampled rows, [R, V] and [R]."""

    hidden: Tensor | None
    logits: Tensor
    argmax: Tensor


class ModelRunner:
    """Runs steps. Make it and compile it in the process's main thread: CUDA graphs are recorded there.

    max_num_draft_tokens: most draft tokens of one sequence that a step verifies.
    max_query_len: most tokens of a sequence in a uniform step, if not the plan's.
    vocab_size: columns of the logits, if not the model's own: a draft model's are those of its target.
    head_tokens: the token of each row of the head, if these are not all tokens in order.
    ranks: the other ranks of a tensor-parallel model, if this is the first one.
    previous_token_ids: samples of the last step, or of a draft model, that the next step reads on the device.
    """

    def __init__(
        self,
        plan: ExecutionPlan,
        config: ModelConfig,
        weights: Weights,
        kv_cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_num_draft_tokens: int = 0,
        max_query_len: int | None = None,
        vocab_size: int | None = None,
        head_tokens: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.plan = plan
        self.config = config
        self.weights = weights
        self.kv_cache = kv_cache
        self.vocabulary = Vocabulary(vocab_size or config.vocab_size, head_tokens)
        self.device = kv_cache.keys.device
        self.block_size = kv_cache.block_size
        self.is_cuda = self.device.type == "cuda"
        self._ranks = ranks
        self._max_query_len = plan.max_query_len if max_query_len is None else max_query_len
        decoder: ops.Decoder | None = None
        if plan.fuses_layers:
            decoder = build_decoder(weights, config, self.vocabulary, kv_cache)
            self.plan = replace(plan, fuses_layers=decoder is not None)
        self._functions = self._eager = eager_steps(config, self.vocabulary, decoder)
        self._compiled = self._eager
        self.shapes = StepShapes(
            plan,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_draft_tokens=max_num_draft_tokens,
            max_blocks_per_seq=max(2, -(-max_model_len // self.block_size)),
            max_query_len=self._max_query_len,
        )
        largest = self.shapes.largest
        self._hosts = [
            HostBuffer(largest.size, largest.num_sampled, is_pinned=self.is_cuda)
            for _ in range(2 if self.is_cuda else 1)
        ]
        self._inputs = (
            torch.zeros_like(self._hosts[0].flat, device=self.device) if self.is_cuda else self._hosts[0].flat
        )
        self._device_inputs = functools.lru_cache(256)(self._marked_views)
        self.previous_token_ids = torch.zeros(largest.num_sampled, dtype=torch.int64, device=self.device)
        self._sampled_index: dict[int, int] = {}
        ops.allocate_workspaces(self.device)
        if plan.replays:
            mark_static(weights, kv_cache, self.previous_token_ids, head_tokens)
        if plan.compile != "off":
            # The number of blocks depends on the memory that is free at start. A graph with that number in it would
            # not be found in the disk cache by the next start.
            mark_dynamic(kv_cache.keys, 1)
            mark_dynamic(kv_cache.values, 1)
        self.sampler = Sampler(self.device, self.vocabulary.size, self._logits)

    @property
    def is_compiled(self) -> bool:
        """Whether steps run the compiled functions."""
        return self._functions is not self._eager

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Run a step and wait for its result."""
        return self.launch(step).wait()

    @torch.inference_mode()
    def launch(self, step: SchedulerOutput, drafts: DeviceDrafts | None = None) -> PendingStep:
        """Launch a step. Before it, at most one step may be pending, and none unless the plan overlaps.

        drafts: draft tokens that the step verifies and the host does not know yet.
        """
        if step.copies:
            if self._ranks is not None:
                self._ranks.send(CopyBlocks(step.copies))
            self.copy_blocks(step.copies)
        stream = torch.cuda.current_stream(self.device) if self.is_cuda else None
        with replay_lock() if self.plan.replays else nullcontext():
            outputs = self._launch(step.scheduled_sequences, drafts, stream)
        event = None
        if stream is not None:
            event = torch.cuda.Event()
            event.record(stream)
        return PendingStep(outputs, event, drafts, self._ranks)

    def _launch(
        self, scheduled: tuple[ScheduledSequence, ...], drafts: DeviceDrafts | None, stream: torch.cuda.Stream | None
    ) -> list[SamplerOutput]:
        results: list[SamplerOutput] = []
        sampled_index: dict[int, int] = {}
        num_sampled = 0
        draft_index = {} if drafts is None else drafts.first_index
        for items, exact in split_step(scheduled, self._max_query_len, mixes=self.plan.mixes):
            shape = self.shapes.padded(exact, is_compiled=self.is_compiled)
            rows = write_inputs(self._zeroed_inputs(shape), items, self.block_size, self._sampled_index, draft_index)
            inputs = self._upload(shape, stream)
            outputs = self._compute(shape, inputs, is_compiled=self.is_compiled)
            result = self.sampler.sample(items, rows, *outputs, inputs.sampling)
            if result.token_ids is not None and self.plan.overlaps:
                end = num_sampled + len(result.token_ids)
                self.previous_token_ids[num_sampled:end].copy_(result.token_ids)
                sampled_index |= {
                    item.sequence.id: num_sampled + row for row, item in enumerate(rows) if item is not None
                }
                num_sampled = end
            results.append(result.to_host(self._hosts[0].token_ids))
        self._sampled_index = sampled_index
        return results

    @torch.inference_mode()
    def copy_blocks(self, blocks: tuple[tuple[int, int], ...]) -> None:
        """Copy the first block of each pair to the second."""
        source, destination = torch.tensor(blocks, device=self.device).unbind(1)
        ops.copy_blocks(*self.kv_cache, source, destination)

    @torch.inference_mode()
    def run_inputs(self, shape: StepShape, inputs: bytes, *, is_compiled: bool) -> None:
        """Run the model, as a follower rank, on step inputs that the first rank wrote."""
        if is_compiled and self._compiled is self._eager:
            self._start_compiling()
        self._zeroed_inputs(shape)
        self._hosts[0].flat[: shape.size].copy_(torch.frombuffer(bytearray(inputs), dtype=torch.int32))
        self._forward(shape, self._upload(shape), is_compiled=is_compiled)

    @torch.inference_mode()
    def compute_logits(self, hidden: bytes) -> None:
        """Compute, as a follower rank, the logits of the first rank's hidden states, [R, E]."""
        states = torch.frombuffer(bytearray(hidden), dtype=self.weights.final_norm.dtype)
        self._logits(states.view(-1, len(self.weights.final_norm)).to(self.device))

    def compile_pieces(self, sampler: SamplerFunctions | None = None) -> Iterator[None]:
        """Compile everything that a run can need, one call of a compiled function at each `next`.

        Eager steps may run in between; after the last `next` steps run the compiled functions. If the compiler fails,
        warn and run eagerly. The disk keeps compiled code, so that a second process spends seconds here instead of
        tens of seconds.

        sampler: compiled functions of another model of the same vocabulary.
        Raises TensorParallelError if it fails inside of a computation of all ranks, which cannot be resumed.
        """
        try:
            yield from self._compile_pieces(sampler)
        except Exception as error:  # a compiler can fail in any way; the engine works without one
            if self._ranks is not None and self._ranks.is_broken:
                raise
            self._functions = self._compiled = self._eager
            self.sampler.use_eager_functions()
            warn_about_eager_fallback(root_cause(error))

    def _compile_pieces(self, sampler: SamplerFunctions | None) -> Iterator[None]:
        self._start_compiling()
        traced = [TRACED_DECODE, TRACED_PREFILL] if self._max_query_len else [TRACED_PREFILL]
        for shape in traced:
            outputs, inputs = self._run_dummy(shape, is_compiled=True)
            yield
        if sampler is None:
            sampler = compiled_functions(self.device)
            with torch.inference_mode():
                calls = warm_up_calls(sampler, outputs.logits.clone(), inputs.sampling)
            for call in calls:
                with torch.inference_mode():
                    call()
                yield
        if self.plan.replays:
            for shape in self.shapes.recorded():
                # The first call warms up the memory pool, the second records the graph.
                for _ in range(2):
                    self._run_dummy(shape, is_compiled=True)
                yield
        self._functions = self._compiled
        self.sampler.functions = sampler

    def _start_compiling(self) -> None:
        choose_compile_cache()
        self._compiled = compiled_steps(self.config, self.vocabulary, replays=self.plan.replays)

    @torch.inference_mode()
    def _run_dummy(self, shape: StepShape, *, is_compiled: bool) -> tuple[_Outputs, StepInputs[Tensor]]:
        """Run a step of padding only."""
        write_inputs(self._zeroed_inputs(shape), (), self.block_size)
        inputs = self._upload(shape)
        return self._compute(shape, inputs, is_compiled=is_compiled), inputs

    @torch.inference_mode()
    def run_padding(self, num_tokens: int, num_sampled: int) -> None:
        """Run a ragged step of padding only, eagerly, to measure the memory that it takes."""
        exact = StepShape(num_tokens, 2, 2, num_sampled, None)
        outputs, inputs = self._run_dummy(self.shapes.padded(exact, is_compiled=False), is_compiled=False)
        self.sampler.run_all(outputs.logits, inputs.sampling)

    def _zeroed_inputs(self, shape: StepShape) -> StepInputs[np.ndarray]:
        """Return zeroed inputs on the host for the next step."""
        self._hosts.reverse()
        return self._hosts[0].zeroed(shape)

    def _upload(self, shape: StepShape, stream: torch.cuda.Stream | None = None) -> StepInputs[Tensor]:
        """Return the inputs that were written on the host as the device reads them."""
        inputs = self._device_inputs(shape)
        if self.is_cuda:
            self._hosts[0].copy_to(inputs.flat, stream)
        return inputs

    def _marked_views(self, shape: StepShape) -> StepInputs[Tensor]:
        """Return a shape's inputs as the device reads them, with the marks that the compiler needs."""
        inputs = input_views(self._inputs, shape)
        if self.plan.compile != "off":
            mark_inputs(inputs.batch, *inputs.sampling, inputs.previous_indices, replays=self.plan.replays)
        return inputs

    def _compute(self, shape: StepShape, inputs: StepInputs[Tensor], *, is_compiled: bool) -> _Outputs:
        """Run the model, in all ranks."""
        if self._ranks is None:
            return self._forward(shape, inputs, is_compiled=is_compiled)
        payload = self._hosts[0].flat[: shape.size].numpy().tobytes()
        with self._ranks.together(RunStep(shape, payload, is_compiled)):
            return self._forward(shape, inputs, is_compiled=is_compiled)

    def _forward(self, shape: StepShape, inputs: StepInputs[Tensor], *, is_compiled: bool) -> _Outputs:
        functions = self._compiled if is_compiled else self._eager
        previous = None
        if self.plan.reads_device_tokens:
            previous = PreviousTokens(inputs.previous_indices, self.previous_token_ids)
        arguments = (self.weights, inputs.batch, self.kv_cache, previous)
        if is_compiled and self.plan.replays:
            begin_replay()
        if shape.query_len is not None:
            return _Outputs(None, *functions.decode(*arguments))
        return _Outputs(*functions.prefill(*arguments))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states, computed by all ranks."""
        together: AbstractContextManager[None] = nullcontext()
        if self._ranks is not None:
            together = self._ranks.together(
                ComputeLogits(hidden.contiguous().view(torch.uint8).cpu().numpy().tobytes())
            )
        with together:
            return head(hidden, self.weights, self.config, self.vocabulary)[0]
