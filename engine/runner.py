"""Owns what lives on the device: weights, KV cache, step inputs. What is compiled is warmed up here.

On CUDA the layers of a step that decodes or verifies are one op each, and nothing of them is left to compile; where
they are not, a step that decodes is compiled as a whole, greedy choice included. Other steps are compiled layer by
layer. All but the largest are recorded as CUDA graphs, for buckets of sizes (`StepGraphs`), and recorded again once
something was compiled. On CPU, where our kernels leave nothing to fuse and nothing is compiled unless asked for, one
layer is compiled and called for every layer. What else may be asked of a choice (`TokenChooser`) is compiled apart, so
that a step runs only what it uses.
"""

import functools
import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from engine import token_chooser
from engine.compile_cache import choose_compile_cache
from engine.compile_pieces import RAGGED, Compiled, ModelParts, compile_pieces
from engine.compiled_model import (
    Feedback,
    compiled_functions,
    eager_functions,
    first_cause,
    mark_dynamic,
    mark_static,
    warn_eager,
)
from engine.launched import Launched
from engine.rank_messages import Compute, Copy, Head
from engine.sequence import Needs
from engine.step import Step, StepResult, Work
from engine.step_graphs import Outputs, StepGraphs, ragged_shapes
from engine.step_inputs import StepInputs, StepShape, batch_buckets, carve, chosen_rows, fill
from engine.token_chooser import Choice, TokenChooser
from layers.config import ModelConfig
from layers.model import is_one_op
from layers.types import KVCache, Weights
from ops import copy_blocks
from ops.paged_attention import has_cpu_kernel

if TYPE_CHECKING:
    from engine.recorded_draft_loop import Guesses
    from engine.tensor_parallel import TensorParallel

log = logging.getLogger("dispec")

_FEW = 16  # tokens of a sequence in a uniform step


class _Launch(NamedTuple):
    """One pass over the model: a step, or a part of it."""

    work: tuple[Work, ...]
    shape: StepShape


def _is_uniform(work: Work, num_tokens: int) -> bool:
    """Whether it has so many tokens and no logits of its prompt are wanted, which come from ragged launches alone."""
    in_prompt = work.start < work.sequence.num_prompt_tokens - 1
    return work.num_tokens == num_tokens and not (in_prompt and work.sequence.needs & Needs.PROMPT_LOGPROBS)


class Runner:
    """Runs steps. Make it and use it in the process's main thread: CUDA-graph trees belong to a thread.

    max_num_drafts: most guesses of one sequence that a step verifies.
    vocab_size: columns of the logits, if not the model's own: a draft model's are those of its target.
    head_tokens: which tokens the rows of the head stand for, if not for all in order.
    overlaps: whether a step may be launched before the one before it was waited for.
    reads_guesses: whether the guesses of a step may be where a draft model left them.
    ranks: the others that hold a part of the model, if this is the first of several.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        kv_cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_num_drafts: int = 0,
        vocab_size: int | None = None,
        head_tokens: Tensor | None = None,
        overlaps: bool = False,
        reads_guesses: bool = False,
        ranks: "TensorParallel | None" = None,
    ) -> None:
        self._ranks = ranks
        self._is_shard = config.shard is not None
        self._layers_are_ops = all(is_one_op(w, config, kv) for w, kv in zip(weights.blocks, kv_cache, strict=True))
        self.weights = weights
        self.kv_cache = kv_cache
        self.device = kv_cache[0].keys.device
        self.block_size = kv_cache[0].keys.shape[3]
        self.is_cuda = self.device.type == "cuda"
        self.is_compiled = False
        self._overlaps = overlaps
        # Guesses that are still on the device are read there, as the tokens of a step that is not waited for are.
        self._feeds = overlaps or reads_guesses
        keys = kv_cache[0].keys
        self._mixes = self.is_cuda or has_cpu_kernel(keys.dtype, keys.shape[2], self.block_size)
        vocab_size = vocab_size or config.vocab_size
        self._functions = self._eager = eager_functions(config, vocab_size, head_tokens)
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_drafts = max_num_drafts
        self._has_many_rows = max_num_seqs * (1 + max_num_drafts) > 1
        self._buckets = batch_buckets(max_num_seqs)
        self._max_blocks = max(2, -(-max_model_len // self.block_size))
        # Room for the largest step, and for those that only warm up.
        largest = StepShape(
            tokens=max(max_num_batched_tokens, RAGGED.tokens),
            sequences=max(self._buckets[-1], RAGGED.sequences),
            blocks=max(self._max_blocks, RAGGED.blocks),
            rows=chosen_rows(self._buckets[-1] * (1 + max_num_drafts)),
            query_len=None,
        )
        size = sum(largest.field_sizes())
        # The device may still be reading the inputs of one step while those of the next are written.
        self._hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=self.is_cuda) for _ in range(1 + overlaps)]
        self._inputs = torch.zeros_like(self._hosts[0], device=self.device) if self.is_cuda else self._hosts[0]
        # Making eleven views costs as much as the rest of a step's preparation, and shapes recur.
        self._host_inputs = [functools.lru_cache(256)(functools.partial(carve, host)) for host in self._hosts]
        self._device_inputs = functools.lru_cache(256)(functools.partial(carve, self._inputs))
        self.chosen = torch.zeros(largest.rows, dtype=torch.int64, device=self.device)
        self._pending_rows: dict[int, int] = {}
        self._graphs: StepGraphs | None = None
        if self.is_cuda and self._is_shard:
            mark_static(weights, kv_cache, self.chosen)
        self.chooser = TokenChooser(self.device, vocab_size, self._head)

    @torch.inference_mode()
    def launch(self, step: Step, guesses: "Guesses | None" = None) -> Launched:
        """Start a step. At most one may be under way that was not waited for, and none without `overlaps`.

        guesses: those that the step is to verify and the host does not know yet.
        """
        if step.copies:
            if self._ranks is not None:
                self._ranks.send(Copy(step.copies))
            self.copy(step.copies)
        self._hosts.reverse()
        self._host_inputs.reverse()
        choices: list[Choice] = []
        rows: dict[int, int] = {}
        num_rows = 0
        pending_rows = self._pending_rows if guesses is None else guesses.rows
        for launch in self._split(step):
            host = self._zeroed_inputs(launch.shape)
            sampled = fill(host, launch.work, self.block_size, pending_rows)
            inputs = self._upload(launch.shape)
            hidden, logits, chosen = self._compute(launch.shape, inputs)
            choice = self.chooser.choose(launch.work, sampled, hidden, logits, chosen, inputs.sampling)
            if choice.tokens is not None and self._overlaps:
                self.chosen[num_rows : num_rows + len(choice.tokens)].copy_(choice.tokens)
                rows |= {item.sequence.id: num_rows + row for row, item in enumerate(sampled) if item is not None}
                num_rows += len(choice.tokens)
            choices.append(choice.to_host())
        self._pending_rows = rows
        event = None
        if self.is_cuda:
            event = torch.cuda.Event()
            event.record()
        return Launched(choices, event, guesses)

    @torch.inference_mode()
    def copy(self, blocks: tuple[tuple[int, int], ...]) -> None:
        """Copy blocks, each from the first of a pair to the second."""
        source, destination = torch.tensor(blocks, device=self.device).unbind(1)
        for layer in self.kv_cache:
            copy_blocks(layer.keys, layer.values, source, destination)

    @torch.inference_mode()
    def follow(self, shape: StepShape, inputs: bytes, warm_up: bool) -> None:
        """Compute what the first rank does, given the step inputs that it wrote."""
        if warm_up and self._functions is self._eager:
            self._functions = compiled_functions(self._eager, with_whole=self.is_cuda, replays=True)
        self._hosts[0][: sum(shape.field_sizes())].copy_(torch.frombuffer(bytearray(inputs), dtype=torch.int32))
        self._compute(shape, self._upload(shape), warm_up)

    @torch.inference_mode()
    def follow_head(self, hidden: bytes) -> None:
        """The same for the head alone, given hidden states."""
        states = torch.frombuffer(bytearray(hidden), dtype=self.weights.final_norm.dtype)
        self._head(states.view(-1, len(self.weights.final_norm)).to(self.device))

    def run(self, step: Step) -> StepResult:
        """Run a step to its end."""
        return self.launch(step).wait()

    def compile(self, show_progress: bool = False) -> None:
        """Compile every graph that a run can need, by running each once; falls back to eager with one warning.

        Raises TensorParallelError if that fails amid what all ranks compute: they would not meet again.

        What is compiled is kept on disk, so a second process spends seconds here instead of tens.
        """
        choose_compile_cache()
        try:
            with tqdm(desc="compiling", unit="graph", disable=not show_progress, leave=False) as bar:
                if self.is_cuda and not self._layers_are_ops:
                    self._compile_as_a_whole(bar.update)
                else:
                    self._compile_in_pieces(bar.update)
        except Exception as error:  # a compiler can fail in any way; the engine works without one
            if self._ranks is not None and self._ranks.is_broken:
                raise
            self._forget_compiled(error)

    def compile_pieces(self) -> Generator[None, None, Compiled]:
        """The same, a graph at each `next`; steps may run in between, and the result be taken with `take`.

        On CUDA this is for models whose layers are one op each in uniform steps.
        """
        parts = ModelParts(self._eager, self.weights, self.kv_cache[0], self.chosen if self._feeds else None)
        sizes = (self.chooser.vocab_size, self.block_size, self._max_num_seqs, self._max_num_drafts)
        return compile_pieces(parts, *sizes, self.device)

    def take(self, compiled: Compiled) -> None:
        """Run what was compiled from the next step on. Every graph of it has been traced."""
        self._functions = compiled.model
        self.chooser.functions = compiled.chooser
        try:
            if self.is_cuda:
                self.record()
            self.is_compiled = True
        except Exception as error:
            self._forget_compiled(error)

    def _forget_compiled(self, error: Exception) -> None:
        self._functions = self._eager
        self.chooser.forget_compiled()
        warn_eager(first_cause(error))
        if self.is_cuda and self._layers_are_ops:
            self.record()

    @torch.inference_mode()
    def _compile_in_pieces(self, on_progress: Callable[[], object]) -> None:
        pieces = self.compile_pieces()
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                self.take(end.value)
                return
            on_progress()

    def _compile_as_a_whole(self, on_progress: Callable[[], object]) -> None:
        self._functions = compiled_functions(self._eager, with_whole=True, replays=self._is_shard)
        self.chooser.functions = token_chooser.compiled_functions(self.device)
        mark_dynamic(*(pages for layer in self.kv_cache for pages in layer))
        for shape in self._warm_up_shapes():
            self._warm_up(shape)
            on_progress()
        if not self._is_shard:  # what replays here would have to replay in every rank
            self.record()
        self.is_compiled = True

    @torch.inference_mode()
    def run_padding(self, num_tokens: int, rows: int) -> None:
        """Run a ragged step of padding only, to see what memory it takes."""
        shape = StepShape(num_tokens, 2, self._max_blocks, rows, None)
        fill(self._zeroed_inputs(shape), (), self.block_size, {})
        inputs = self._upload(shape)
        _, logits, _ = self._compute(shape, inputs)
        assert logits is not None
        self.chooser.warm_up(logits, inputs.sampling)

    def _split(self, step: Step) -> Iterator[_Launch]:
        """A step is one launch. Only without a kernel for attention over pages its decodes are one and its prompts
        another: the uniform graph's attention is so much faster then that reading the weights twice costs less."""
        if (num_tokens := self._same_tokens(step)) is not None:
            count, rows = len(step.work), sum(work.num_rows for work in step.work)
            shape = StepShape(num_tokens * count, count, self._width(step.work), rows, num_tokens)
            yield _Launch(step.work, self._graphs.padded(shape) if self._graphs else shape)
            return
        ones = tuple(work for work in step.work if _is_uniform(work, 1))
        others = tuple(work for work in step.work if not _is_uniform(work, 1))
        if ones and not (others and self._mixes):
            yield _Launch(ones, self._uniform_shape(len(ones), self._width(ones)))
        if others:
            together = ones + others if self._mixes else others
            rows = sum(work.num_rows for work in together)
            tokens = sum(work.num_tokens for work in together)
            # A size of 1 is a graph of its own to the compiler; an empty sequence and a token of padding avoid that.
            shape = StepShape(max(2, tokens), max(2, len(together)), self._width(together), rows, None)
            yield _Launch(together, self._graphs.padded(shape) if self._graphs else shape)

    def _same_tokens(self, step: Step) -> int | None:
        """The tokens of each of the step's works, if all have as many and choose tokens, as where guesses are verified
        and where a draft model makes up for one that stood: their layers are single kernels then, as in decoding. They
        are not compiled: on a CPU an engine that is has no graph of them, on CUDA they are recorded as they are."""
        num_tokens = step.work[0].num_tokens if step.work else 0
        has_kernels = self._graphs is not None if self.is_cuda else self._functions is self._eager and self._mixes
        if not has_kernels or not 1 < num_tokens <= (self._max_num_drafts + 1 if self.is_cuda else _FEW):
            return None
        is_same = all(work.samples and _is_uniform(work, num_tokens) for work in step.work)
        return num_tokens if is_same else None

    def _uniform_shape(self, size: int, width: int) -> StepShape:
        if self.is_cuda:
            size = next(bucket for bucket in self._buckets if bucket >= size)
        return StepShape(size, size, width, size, 1)

    def _width(self, work: tuple[Work, ...]) -> int:
        """Columns of the block tables: fixed where graphs are recorded, else no more than needed."""
        return self._max_blocks if self.is_cuda else max(2, *(len(item.sequence.block_table) for item in work))

    def _zeroed_inputs(self, shape: StepShape) -> StepInputs:
        self._hosts[0][: sum(shape.field_sizes())] = 0
        return self._host_inputs[0](shape)

    def _upload(self, shape: StepShape) -> StepInputs:
        """The inputs that were written on the host, where the device reads them."""
        if not self.is_cuda:
            return self._host_inputs[0](shape)
        used = sum(shape.field_sizes())
        self._inputs[:used].copy_(self._hosts[0][:used], non_blocking=True)
        return self._device_inputs(shape)

    def _compute(
        self, shape: StepShape, inputs: StepInputs, warm_up: bool = False
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Run the model: the hidden states of all tokens of a ragged step, logits and argmax of the rows wanted."""
        if self._ranks is not None:
            payload = self._hosts[0][: sum(shape.field_sizes())].numpy().tobytes()
            with self._ranks.together(Compute(shape, warm_up), payload), self._guards():
                return self._forward(shape, inputs, warm_up)
        if self._graphs is not None and (outputs := self._graphs.replay(shape)) is not None:
            return outputs
        with self._guards():
            return self._forward(shape, inputs, warm_up)

    def _guards(self) -> AbstractContextManager[object]:
        """Warm-up has traced every graph there will be: a step need only tell them apart, not guard what never changes.

        Eagerly there is nothing to guard, and asking for it would import the compiler.
        """
        if self.is_compiled and self._functions is not self._eager:
            return torch.compiler.set_stance(skip_guard_eval_unsafe=True)
        return nullcontext()

    def _forward(
        self, shape: StepShape, inputs: StepInputs, warm_up: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        batch = inputs.batch
        feedback = Feedback(inputs.token_source, self.chosen) if self._feeds else None
        functions, is_uniform = self._functions, shape.query_len is not None
        # Eagerly nobody is to be told, and telling would import the compiler.
        warm_up = warm_up and functions is not self._eager
        if warm_up:
            mark_dynamic(*batch, inputs.token_source)
        # A layer of one op is recorded as it is, and so is one that verifies.
        as_it_is = self.is_cuda and is_uniform and (self._layers_are_ops or shape.query_len != 1)
        if functions.whole is not None and is_uniform and not as_it_is:
            if self.is_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            return None, *functions.whole(self.weights, batch, self.kv_cache, feedback)
        block = self._eager.block if as_it_is else functions.block
        x, rotation = functions.embed(self.weights, batch, feedback)
        for w, kv in zip(self.weights.blocks, self.kv_cache, strict=True):
            if warm_up:
                mark_dynamic(x, *rotation)
            x = block(x, w, batch, rotation, kv)
        hidden = None if shape.query_len == 1 else x
        if not shape.rows:
            return hidden, None, None
        if hidden is not None:
            x = x.index_select(0, batch.logits_indices)
        if warm_up:
            mark_dynamic(x)
        return hidden, *functions.head(x, self.weights)

    def _head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        # Without steps of several rows the head was traced for one row alone.
        functions = self._functions if self._has_many_rows or len(hidden) == 1 else self._eager
        with self._guards(), self._together(hidden):
            return functions.head(hidden, self.weights)

    def _together(self, hidden: Tensor) -> AbstractContextManager[object]:
        if self._ranks is None:
            return nullcontext()
        return self._ranks.together(Head(), hidden.contiguous().view(torch.uint8).cpu().numpy().tobytes())

    def _warm_up_shapes(self) -> Iterator[StepShape]:
        """Shapes that between them trace and record every graph on CUDA: the largest graphs first, so that smaller
        ones reuse their memory."""
        for bucket in reversed(self._buckets) if self._is_shard else self._buckets[-1:]:
            yield self._uniform_shape(bucket, self._max_blocks)
        ragged = RAGGED._replace(blocks=self._max_blocks)
        if self._has_many_rows:
            yield ragged
        yield ragged._replace(rows=1)

    @torch.inference_mode()
    def _warm_up(self, shape: StepShape) -> None:
        fill(self._zeroed_inputs(shape), (), self.block_size, {})
        inputs = self._upload(shape)
        # For the compiler to record a CUDA graph takes a run to trace, one to warm its memory pool and one to record.
        for _ in range(3 if self._is_shard else 1):
            _, logits, _ = self._compute(shape, inputs, warm_up=True)
        if logits is not None and shape.query_len is None:
            self.chooser.warm_up(logits, inputs.sampling)

    @torch.inference_mode()
    def record(self) -> None:
        """Record the graphs of all steps but the largest, of functions as they are now: compiled ones, once traced.

        Waits for a step that is under way, whose inputs it overwrites.
        """
        torch.cuda.synchronize(self.device)
        self._graphs = None  # whose memory the new ones may have

        def prepare(shape: StepShape) -> Callable[[], Outputs]:
            fill(self._zeroed_inputs(shape), (), self.block_size, {})
            inputs = self._upload(shape)

            def launch() -> Outputs:
                hidden, logits, chosen = self._compute(shape, inputs, warm_up=True)
                assert logits is not None
                assert chosen is not None
                return hidden, logits, chosen

            return launch

        shapes = ragged_shapes(
            self._max_num_batched_tokens,
            max(2, self._buckets[-1]),  # ragged steps have at least two
            self._max_blocks,
            self._max_num_seqs,
            self._max_num_drafts,
        )
        shapes += [
            StepShape(query_len * size, size, self._max_blocks, query_len * size, query_len)
            for query_len in range(1, self._max_num_drafts + 2)
            for size in self._buckets
        ]
        graphs = StepGraphs(shapes)
        graphs.record(prepare, self.weights.final_norm[None])
        self._graphs = graphs
