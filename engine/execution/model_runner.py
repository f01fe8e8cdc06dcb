"""Runs steps on the device, and owns its weights, KV cache and step inputs.

Each step is one call of a pure function of `layers.steps`, eager or compiled as the `ExecutionPlan` says. Compiled
functions are traced, and on CUDA recorded, before they are used. Sampling beyond the likeliest token is separate
(`Sampler`), so that a step runs only what it uses.
"""

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dispec import ops
from dispec.engine.execution import sampler as token_chooser
from dispec.engine.execution.compiled_steps import (
    begin_replay,
    compiled_steps,
    eager_steps,
    first_cause,
    mark_dynamic,
    mark_inputs,
    mark_static,
    replaying,
    warn_eager,
)
from dispec.engine.execution.execution_plan import ExecutionPlan
from dispec.engine.execution.input_buffers import StepInputs, StepShape, input_views, write_inputs
from dispec.engine.execution.pending_step import DeviceDrafts, PendingStep
from dispec.engine.execution.ranks import Ranks
from dispec.engine.execution.sampler import Sampler, SamplerOutput
from dispec.engine.execution.step_shapes import TRACED_DECODE, TRACED_PREFILL, StepShapes
from dispec.engine.machine.compile_cache import choose_compile_cache
from dispec.engine.scheduling.scheduler_output import ModelRunnerOutput, ScheduledSequence, SchedulerOutput
from dispec.engine.scheduling.sequence import SamplingFeatures
from dispec.layers.config import ModelConfig
from dispec.layers.decoding import decoder
from dispec.layers.steps import PreviousTokens, Vocabulary, head
from dispec.layers.types import KVCache, Weights


class _Launch(NamedTuple):
    """One pass of the model: a step, or a part of it. shape: without padding."""

    scheduled: tuple[ScheduledSequence, ...]
    shape: StepShape


class _Outputs(NamedTuple):
    """hidden: of all tokens of a ragged step. logits and token_ids, their argmax: of the wanted rows."""

    hidden: Tensor | None
    logits: Tensor
    token_ids: Tensor


class _HostBuffer:
    """A step's inputs on the host. The device may still be reading those of one step while the next are written."""

    def __init__(self, size: int, *, is_pinned: bool) -> None:
        self.flat = torch.zeros(size, dtype=torch.int32, pin_memory=is_pinned)
        # Shapes recur, and making eleven views costs as much as the rest of a step's preparation.
        self.views = functools.lru_cache(256)(functools.partial(input_views, self.flat))
        self._copied = torch.cuda.Event() if is_pinned else None

    def zeroed(self, shape: StepShape) -> StepInputs:
        """Wait until the device has read what was in the buffer, and return it empty."""
        if self._copied is not None:
            self._copied.synchronize()
        self.flat[: shape.size] = 0
        return self.views(shape)

    def copy_to(self, device_buffer: Tensor, size: int) -> None:
        """Have the device read the inputs."""
        device_buffer[:size].copy_(self.flat[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class ModelRunner:
    """Runs steps. Make it and compile it in the process's main thread: CUDA graphs are recorded there.

    max_num_drafts: most draft tokens of one sequence that a step verifies.
    max_query_len: most tokens of a sequence in a uniform step, if not the plan's.
    vocab_size: columns of the logits, if not the model's own: a draft model's are those of its target.
    head_tokens: the token of each row of the head, if these are not all tokens in order.
    ranks: the other ranks of a tensor-parallel model, if this is the first one.
    sampled: the token ids that the last steps, or a draft model, left on the device.
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
        max_num_drafts: int = 0,
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
        max_blocks = max(2, -(-max_model_len // self.block_size))
        fused: ops.Decoder | None = None
        if plan.fuses_layers:
            fused = decoder(weights, config, self.vocabulary, kv_cache)
            self.plan = replace(plan, fuses_layers=fused is not None)
        self._functions = self._eager = eager_steps(config, self.vocabulary, fused)
        self._compiled = self._eager
        self.shapes = StepShapes(
            plan,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_drafts=max_num_drafts,
            max_blocks=max_blocks,
            max_query_len=self._max_query_len,
        )
        largest = self.shapes.largest
        self._hosts = [_HostBuffer(largest.size, is_pinned=self.is_cuda) for _ in range(2 if self.is_cuda else 1)]
        self._inputs = torch.zeros_like(self._hosts[0].flat, device=self.device) if self.is_cuda else None
        self._device_inputs = functools.lru_cache(256)(self._carve)
        self.sampled = torch.zeros(largest.rows, dtype=torch.int64, device=self.device)
        self._pending_rows: dict[int, int] = {}
        ops.allocate_workspaces(self.device)
        if plan.replays:
            mark_static(weights, kv_cache, self.sampled, head_tokens)
        if plan.compile != "off":
            # The number of blocks depends on the memory that is free at start: graphs with this number in them would
            # be found in the disk cache by no second start.
            mark_dynamic(kv_cache.keys, 1)
            mark_dynamic(kv_cache.values, 1)
        self.sampler = Sampler(self.device, self.vocabulary.size, self._head)

    @property
    def is_compiled(self) -> bool:
        """Whether steps run the compiled functions."""
        return self._functions is not self._eager

    @torch.inference_mode()
    def launch(self, step: SchedulerOutput, drafts: DeviceDrafts | None = None) -> PendingStep:
        """Launch a step. Before it, at most one step may be pending, and none unless the plan overlaps.

        drafts: draft tokens that the step verifies and the host does not know yet.
        """
        if step.copies:
            if self._ranks is not None:
                self._ranks.copy_blocks(step.copies)
            self.copy_blocks(step.copies)
        with replaying() if self.plan.replays else nullcontext():
            choices = self._launch(step.scheduled_sequences, drafts)
        event = None
        if self.is_cuda:
            event = torch.cuda.Event()
            event.record()
        return PendingStep(choices, event, drafts)

    def _launch(self, works: tuple[ScheduledSequence, ...], drafts: DeviceDrafts | None) -> list[SamplerOutput]:
        choices: list[SamplerOutput] = []
        rows: dict[int, int] = {}
        num_rows = 0
        draft_rows = {} if drafts is None else drafts.first_index
        for scheduled, exact in self._split(works) if works else ():
            shape = self.shapes.of(exact, is_compiled=self.is_compiled)
            sampled = write_inputs(
                self._zeroed_inputs(shape), scheduled, self.block_size, self._pending_rows, draft_rows
            )
            inputs = self._upload(shape)
            outputs = self._compute(shape, inputs)
            choice = self.sampler.choose(scheduled, sampled, *outputs, inputs.sampling)
            if choice.tokens is not None and self.plan.overlaps:
                self.sampled[num_rows : num_rows + len(choice.tokens)].copy_(choice.tokens)
                rows |= {item.sequence.id: num_rows + row for row, item in enumerate(sampled) if item is not None}
                num_rows += len(choice.tokens)
            choices.append(choice.to_host())
        self._pending_rows = rows
        return choices

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
        self._forward(shape, self._upload(shape), is_compiled)

    @torch.inference_mode()
    def compute_logits(self, hidden: bytes) -> None:
        """Compute, as a follower rank, the logits of the first rank's hidden states, [R, E]."""
        states = torch.frombuffer(bytearray(hidden), dtype=self.weights.final_norm.dtype)
        self._head(states.view(-1, len(self.weights.final_norm)).to(self.device))

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Run a step to its end."""
        return self.launch(step).wait()

    def compile_pieces(self, sampler: token_chooser.Functions | None = None) -> Iterator[None]:
        """Compile everything that a run can need, one call of a compiled function at each `next`.

        sampler: compiled functions of another model of the same vocabulary. Eager steps may run in between; after the
        last `next` steps run the compiled functions. If the compiler fails, warn and run eagerly. The disk keeps
        compiled code, so that a second process spends seconds here instead of tens of seconds. Raises
        TensorParallelError if it fails inside a computation of all ranks, which cannot be resumed.
        """
        try:
            yield from self._compile_pieces(sampler)
        except Exception as error:  # a compiler can fail in any way; the engine works without one
            if self._ranks is not None and self._ranks.is_broken:
                raise
            self._functions = self._compiled = self._eager
            self.sampler.forget_compiled()
            warn_eager(first_cause(error))

    def _compile_pieces(self, sampler: token_chooser.Functions | None) -> Iterator[None]:
        self._start_compiling()
        traced = [TRACED_DECODE, TRACED_PREFILL] if self._max_query_len else [TRACED_PREFILL]
        for shape in traced:
            outputs, inputs = self._warm_up(shape)
            yield
        if sampler is None:
            sampler = token_chooser.compiled_functions(self.device)
            with torch.inference_mode():
                calls = token_chooser.calls_of_each(sampler, outputs.logits.clone(), inputs.sampling)
            for call in calls:
                with torch.inference_mode():
                    call()
                yield
        if self.plan.replays:
            for shape in self.shapes.recorded():
                # The first call warms up the memory pool, the second records the graph.
                for _ in range(2):
                    self._warm_up(shape)
                yield
        self._functions = self._compiled
        self.sampler.functions = sampler

    def _start_compiling(self) -> None:
        choose_compile_cache()
        self._compiled = compiled_steps(self.config, self.vocabulary, replays=self.plan.replays)

    @torch.inference_mode()
    def _warm_up(self, shape: StepShape) -> tuple[_Outputs, StepInputs]:
        write_inputs(self._zeroed_inputs(shape), (), self.block_size)
        inputs = self._upload(shape)
        return self._compute(shape, inputs, is_compiled=True), inputs

    @torch.inference_mode()
    def run_padding(self, num_tokens: int, rows: int) -> None:
        """Run a ragged step of padding only, eagerly, to measure the memory that it takes."""
        shape = self.shapes.of(StepShape(num_tokens, 2, 2, rows, None), is_compiled=False)
        write_inputs(self._zeroed_inputs(shape), (), self.block_size)
        inputs = self._upload(shape)
        outputs = self._compute(shape, inputs, is_compiled=False)
        self.sampler.run_all(outputs.logits, inputs.sampling)

    def _split(self, works: tuple[ScheduledSequence, ...]) -> Iterator[_Launch]:
        """Split a step into launches: one, or one of decodes and one of prompts without a kernel for paged attention.

        Attention over prompts alone is then faster by more than reading the weights twice costs.
        """
        if (query_len := self._uniform_query_len(works)) is not None:
            yield _exact(works, query_len)
            return
        if self.plan.mixes:
            yield _exact(works, None)
            return
        ones = tuple(scheduled for scheduled in works if _is_uniform(scheduled, 1))
        others = tuple(scheduled for scheduled in works if not _is_uniform(scheduled, 1))
        if ones:
            yield _exact(ones, 1)
        if others:
            yield _exact(others, None)

    def _uniform_query_len(self, scheduled: tuple[ScheduledSequence, ...]) -> int | None:
        """Return the number of tokens of each work, if all works have as many and sample; else None.

        Uniform steps decode, or verify as many draft tokens of each sequence.
        """
        query_len = scheduled[0].num_tokens
        if query_len > self._max_query_len or not all(_is_uniform(item, query_len) for item in scheduled):
            return None
        return query_len if query_len == 1 or all(item.samples for item in scheduled) else None

    def _zeroed_inputs(self, shape: StepShape) -> StepInputs:
        """Return zeroed inputs on the host for the next step."""
        self._hosts.reverse()
        return self._hosts[0].zeroed(shape)

    def _upload(self, shape: StepShape) -> StepInputs:
        """Return the inputs that were written on the host as the device reads them."""
        if self._inputs is not None:
            self._hosts[0].copy_to(self._inputs, shape.size)
        return self._device_inputs(shape)

    def _carve(self, shape: StepShape) -> StepInputs:
        """Return a shape's inputs as the device reads them, with the marks that the compiler needs."""
        inputs = self._hosts[0].views(shape) if self._inputs is None else input_views(self._inputs, shape)
        if self.plan.compile != "off":
            mark_inputs(inputs.batch, *inputs.sampling, inputs.token_source, replays=self.plan.replays)
        return inputs

    def _compute(self, shape: StepShape, inputs: StepInputs, is_compiled: bool | None = None) -> _Outputs:
        """Run the model, in all ranks."""
        if is_compiled is None:
            is_compiled = self.is_compiled
        if self._ranks is None:
            return self._forward(shape, inputs, is_compiled)
        payload = self._hosts[0].flat[: shape.size].numpy().tobytes()
        with self._ranks.step(shape, payload, is_compiled=is_compiled):
            return self._forward(shape, inputs, is_compiled)

    def _forward(self, shape: StepShape, inputs: StepInputs, is_compiled: bool) -> _Outputs:
        functions = self._compiled if is_compiled else self._eager
        previous = PreviousTokens(inputs.token_source, self.sampled) if self.plan.reads_device_tokens else None
        arguments = (self.weights, inputs.batch._replace(query_len=None), self.kv_cache, previous)
        if is_compiled and self.plan.replays:
            begin_replay()
        if shape.query_len is not None:
            return _Outputs(None, *functions.decode(*arguments))
        return _Outputs(*functions.prefill(*arguments))

    def _head(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states, computed by all ranks."""
        with nullcontext() if self._ranks is None else self._ranks.head(_to_bytes(hidden)):
            return head(hidden, self.weights, self.config, self.vocabulary)[0]


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _is_uniform(scheduled: ScheduledSequence, num_tokens: int) -> bool:
    """Return whether a work has that many tokens and needs no prompt logprobs, which ragged steps alone give."""
    in_prompt = scheduled.start < scheduled.sequence.num_prompt_tokens - 1
    return scheduled.num_tokens == num_tokens and not (
        in_prompt and scheduled.sequence.sampling_features & SamplingFeatures.PROMPT_LOGPROBS
    )


def _exact(scheduled: tuple[ScheduledSequence, ...], query_len: int | None) -> _Launch:
    num_tokens = sum(item.num_tokens for item in scheduled)
    num_rows = sum(item.num_sampled for item in scheduled)
    if query_len == 1:
        num_rows = len(scheduled)
    num_blocks = max(2, *(len(item.sequence.block_table) for item in scheduled))
    return _Launch(scheduled, StepShape(num_tokens, len(scheduled), num_blocks, num_rows, query_len))
