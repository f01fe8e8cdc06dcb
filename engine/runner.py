"""Owns what lives on the device: weights, KV cache, step inputs. The only place where anything is compiled.

On CUDA a uniform step is one graph, sampling included, that replays as a CUDA graph for each bucket of batch
sizes; ragged steps are compiled layer by layer. On CPU one layer is compiled and called for every layer, which
costs a third of the compile time of the whole and no step time.
"""

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from tqdm import tqdm

from engine.default_model import cache_directory
from engine.scheduler import Step, Work
from engine.step_inputs import StepShape, carve, fill
from layers import model
from layers.config import ModelConfig
from layers.sampling import sample
from layers.types import Batch, KVCache, Sampling, Weights

log = logging.getLogger("dispec")


# A ragged step in which no two sizes are equal.
_WARM_UP = StepShape(tokens=19, sequences=3, blocks=5, rows=2, query_len=None)


class _Functions(NamedTuple):
    """The model's composition, compiled or not. `whole` runs a uniform step in one call, where there is one."""

    embed: Callable[..., Any]
    block: Callable[..., Tensor]
    choose: Callable[..., Tensor]
    whole: Callable[..., Tensor] | None


class _Launch(NamedTuple):
    """One pass over the model: a step, or a part of it."""

    work: tuple[Work, ...]
    shape: StepShape


class Runner:
    """Runs steps. Make it and use it in the process's main thread: CUDA-graph trees belong to a thread."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        kv_cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        self.weights = weights
        self.kv_cache = kv_cache
        self.device = kv_cache[0].keys.device
        self.block_size = kv_cache[0].keys.shape[3]
        self.is_cuda = self.device.type == "cuda"
        self.is_compiled = False
        self._functions = self._eager = _eager_functions(config)
        self._max_num_seqs = max_num_seqs
        self._buckets = batch_buckets(max_num_seqs)
        self._max_blocks = max(2, -(-max_model_len // self.block_size))
        # Room for the largest step, and for those that only warm up.
        largest = StepShape(
            tokens=max(max_num_batched_tokens, _WARM_UP.tokens),
            sequences=max(self._buckets[-1], _WARM_UP.sequences),
            blocks=max(self._max_blocks, _WARM_UP.blocks),
            rows=max(self._buckets[-1], _WARM_UP.rows),
            query_len=None,
        )
        size = sum(largest.field_sizes())
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=self.is_cuda)
        self._inputs = torch.zeros_like(self._host, device=self.device) if self.is_cuda else self._host
        # Making ten views costs as much as the rest of a step's preparation, and shapes recur.
        self._host_inputs = functools.lru_cache(maxsize=256)(functools.partial(carve, self._host))
        self._device_inputs = functools.lru_cache(maxsize=256)(functools.partial(carve, self._inputs))

    @torch.inference_mode()
    def run(self, step: Step) -> dict[int, int]:
        """Compute a step. Returns the next token of each sequence whose last token it computed, by sequence id."""
        tokens: dict[int, int] = {}
        for launch in self._split(step):
            inputs = self._zeroed_inputs(launch.shape)
            sampled = fill(inputs, launch.work, self.block_size)
            greedy = all(sequence is None or sequence.params.temperature == 0 for sequence in sampled)
            chosen = self._launch(launch.shape, inputs, greedy)
            if chosen is not None:
                for sequence, token in zip(sampled, chosen.tolist(), strict=False):  # further rows are padding
                    if sequence is not None:
                        tokens[sequence.id] = token
        return tokens

    def compile(self, show_progress: bool = False) -> None:
        """Compile every graph that a run can need, by running each once; falls back to eager with one warning.

        What is compiled is kept on disk, so a second process spends seconds here instead of tens.
        """
        choose_compile_cache()
        self._functions = _compiled_functions(self._eager, self.is_cuda)
        # The number of blocks follows the memory that was free at start: were it in the graphs, no second start would
        # find them in the disk cache.
        _mark_dynamic(*(pages for layer in self.kv_cache for pages in layer))
        shapes = [(shape, greedy) for shape in self._warm_up_shapes() for greedy in (True, False)]
        try:
            for shape, greedy in tqdm(shapes, desc="compiling", unit="graph", disable=not show_progress, leave=False):
                self._warm_up(shape, greedy)
        except Exception as error:  # a compiler can fail in any way; the engine works without one
            self._functions = self._eager
            cause: BaseException = error
            while inner := getattr(cause, "inner_exception", None) or cause.__cause__:
                cause = inner  # the compiler wraps what went wrong, and its own first line says nothing
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            warnings.warn(
                f"compilation failed, running eagerly and slower: {type(cause).__name__}: {reason}"
                " (is a C++ compiler installed? `dispec env-check` tells; --enforce-eager silences this)",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self.is_compiled = True

    @torch.inference_mode()
    def run_padding(self, num_tokens: int, rows: int) -> None:
        """Run a ragged step of padding only, to see what memory it takes."""
        shape = StepShape(num_tokens, 2, self._max_blocks, rows, None)
        inputs = self._zeroed_inputs(shape)
        fill(inputs, (), self.block_size)
        self._launch(shape, inputs, greedy=False)

    def _split(self, step: Step) -> Iterator[_Launch]:
        """On CUDA a step is one launch. On CPU its decodes are one and its prompts another: the uniform graph's
        attention is so much faster that reading the weights twice is the lesser cost."""
        ones = tuple(work for work in step.work if work.num_tokens == 1)
        others = tuple(work for work in step.work if work.num_tokens > 1)
        if ones and not (others and self.is_cuda):
            yield _Launch(ones, self._uniform_shape(len(ones), self._width(ones)))
        if others:
            together = ones + others if self.is_cuda else others
            rows = sum(work.samples for work in together)
            tokens = sum(work.num_tokens for work in together)
            # A size of 1 is a graph of its own to the compiler; an empty sequence avoids that.
            yield _Launch(together, StepShape(tokens, max(2, len(together)), self._width(together), rows, None))

    def _uniform_shape(self, size: int, width: int) -> StepShape:
        if self.is_cuda:
            size = next(bucket for bucket in self._buckets if bucket >= size)
        return StepShape(size, size, width, size, 1)

    def _width(self, work: tuple[Work, ...]) -> int:
        """Columns of the block tables: fixed where graphs are recorded, else no more than needed."""
        return self._max_blocks if self.is_cuda else max(2, *(len(item.sequence.block_table) for item in work))

    def _zeroed_inputs(self, shape: StepShape) -> tuple[Batch, Sampling]:
        self._host[: sum(shape.field_sizes())] = 0
        return self._host_inputs(shape)

    def _launch(
        self, shape: StepShape, inputs: tuple[Batch, Sampling], greedy: bool, warm_up: bool = False
    ) -> Tensor | None:
        """Run the model on host inputs; the chosen token of each row, if there are rows."""
        if self.is_cuda:
            used = sum(shape.field_sizes())
            self._inputs[:used].copy_(self._host[:used], non_blocking=True)
            inputs = self._device_inputs(shape)
        # Warm-up has traced every graph there will be: a step need only tell them apart, not guard what never changes.
        with torch.compiler.set_stance(skip_guard_eval_unsafe=self.is_compiled):
            return self._compute(shape, *inputs, greedy, warm_up)

    def _compute(
        self, shape: StepShape, batch: Batch, sampling: Sampling, greedy: bool, warm_up: bool
    ) -> Tensor | None:
        if warm_up:
            _mark_dynamic(*batch, *sampling)
            if not self.is_cuda:
                torch._dynamo.maybe_mark_dynamic(batch.block_tables, 1)
        chooser = None if greedy else sampling
        if self._functions.whole is not None and shape.query_len is not None:
            torch.compiler.cudagraph_mark_step_begin()
            return self._functions.whole(self.weights, batch, self.kv_cache, chooser)
        x, rotation = self._functions.embed(self.weights, batch)
        for w, kv in zip(self.weights.blocks, self.kv_cache, strict=True):
            if warm_up:
                _mark_dynamic(x, *rotation)
            x = self._functions.block(x, w, batch, rotation, kv)
        if not shape.rows:
            return None
        if shape.query_len != 1:
            x = x[batch.logits_indices]
        if warm_up:
            _mark_dynamic(x)
        return self._functions.choose(x, self.weights, chooser)

    def _warm_up_shapes(self) -> Iterator[StepShape]:
        """Shapes that between them trace every graph. Sizes differ from one another, lest the compiler take two
        that happen to be equal for one; largest CUDA graphs first, so that smaller ones reuse their memory."""
        if self.is_cuda:
            for bucket in reversed(self._buckets):
                yield self._uniform_shape(bucket, self._max_blocks)
        else:
            yield StepShape(1, 1, 5, 1, 1)
            if self._max_num_seqs > 1:
                yield StepShape(3, 3, 5, 3, 1)
        ragged = _WARM_UP._replace(blocks=self._max_blocks) if self.is_cuda else _WARM_UP
        if self._max_num_seqs > 1:
            yield ragged
        yield ragged._replace(rows=1)

    @torch.inference_mode()
    def _warm_up(self, shape: StepShape, greedy: bool) -> None:
        inputs = self._zeroed_inputs(shape)
        fill(inputs, (), self.block_size)
        # Recording a CUDA graph takes a run to trace, one to warm its memory pool and one to record.
        for _ in range(3 if self.is_cuda else 1):
            self._launch(shape, inputs, greedy, warm_up=True)


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes that uniform steps are padded to: fine steps where a row costs much, coarse ones later."""
    sizes = [2, 4, 8, *range(16, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max(2, max_num_seqs)]


def choose_compile_cache() -> None:
    """Keep compiled code in the user's cache directory, unless TORCHINDUCTOR_CACHE_DIR names another.

    Inductor writes its default, a temporary directory, into that variable as soon as anybody asks for it.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_directory() / f"inductor-torch-{torch.__version__}")


def mark_static(weights: Weights, kv_cache: KVCache) -> None:
    """Tell CUDA graphs that weights and KV cache never move; without it every replay copies them."""
    for tensor in torch.utils._pytree.tree_leaves((weights, kv_cache)):
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static_address(tensor, guard=False)


def _eager_functions(config: ModelConfig) -> _Functions:
    def embed(weights: Weights, batch: Batch) -> Any:
        return model.embed(weights, config, batch)

    def block(x: Tensor, w: Any, batch: Batch, rotation: Any, kv: Any) -> Tensor:
        return model.block(x, w, config, batch, rotation, kv)

    def choose(x: Tensor, weights: Weights, sampling: Sampling | None) -> Tensor:
        return sample(model.logits(x, weights, config), sampling)

    def whole(weights: Weights, batch: Batch, kv_cache: KVCache, sampling: Sampling | None) -> Tensor:
        return sample(model.forward(weights, config, batch, kv_cache), sampling)

    return _Functions(embed, block, choose, whole)


def _compiled_functions(eager: _Functions, is_cuda: bool) -> _Functions:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    whole = None
    if is_cuda:
        torch._inductor.config.triton.cudagraph_dynamic_shape_warn_limit = None
        assert eager.whole is not None
        whole = torch.compile(eager.whole, mode="reduce-overhead", fullgraph=True)
    embed, block, choose = (torch.compile(function, fullgraph=True) for function in eager[:3])
    return _Functions(embed, block, choose, whole)


def _mark_dynamic(*tensors: Tensor | int | None) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
