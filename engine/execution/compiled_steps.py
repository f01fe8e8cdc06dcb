"""Every `torch.compile` call of the steps, and what the compiler must be told about their tensors."""

import threading
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dispec import ops
from dispec.layers.config import ModelConfig
from dispec.layers.steps import Vocabulary, decode_step, prefill_step
from dispec.layers.types import Batch


class StepFunctions(NamedTuple):
    """The steps of a model, compiled or not: functions of weights, batch, cache and previous tokens."""

    decode: Callable[..., tuple[Tensor, Tensor]]
    prefill: Callable[..., tuple[Tensor, Tensor, Tensor]]


def eager_steps(config: ModelConfig, vocabulary: Vocabulary, decoder: ops.Decoder | None) -> StepFunctions:
    """Return the steps of a model as they are. decoder: as in `layers.model.hidden_states`."""

    def decode(weights: Any, batch: Any, kv_cache: Any, previous: Any) -> tuple[Tensor, Tensor]:
        return decode_step(weights, config, vocabulary, batch, kv_cache, previous, decoder)

    def prefill(weights: Any, batch: Any, kv_cache: Any, previous: Any) -> tuple[Tensor, Tensor, Tensor]:
        return prefill_step(weights, config, vocabulary, batch, kv_cache, previous)

    return StepFunctions(decode, prefill)


def compiled_steps(config: ModelConfig, vocabulary: Vocabulary, *, replays: bool) -> StepFunctions:
    """Return the steps of a model, each to be compiled as one graph when it is first called."""
    eager = eager_steps(config, vocabulary, None)
    return StepFunctions(*(compiled(function, replays=replays) for function in eager))


def compiled(function: Callable[..., Any], *, replays: bool) -> Callable[..., Any]:
    """Return a function to be compiled when it is first called.

    replays: as CUDA graphs, one for each shape.
    """
    _configure()
    assert isinstance(function, FunctionType)
    # The compiler keeps what it compiled with the function's code. A copy of its own goes with the engine.
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, mode="reduce-overhead" if replays else None, fullgraph=True)


def _configure() -> None:
    # Each engine of a process, and each kind of sampling, is a graph of its own.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    from torch._inductor import config

    # A graph for each shape is what is wanted.
    config.triton.cudagraph_dynamic_shape_warn_limit = None
    # An engine may go from eager to compiled in the middle of an answer: both must round alike.
    config.emulate_precision_casts = True


class _Graphs:
    """The CUDA graphs of this process, which every thread may replay: torch keeps them for each thread apart."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._adopted = threading.local()
        self._trees: tuple[Any, Any] | None = None

    def begin(self) -> None:
        """Begin a replay: what earlier ones returned may be overwritten from now on."""
        if not getattr(self._adopted, "done", False):
            self._adopt()
        torch.compiler.cudagraph_mark_step_begin()

    def _adopt(self) -> None:
        from torch._inductor import cudagraph_trees

        local: Any = cudagraph_trees.local
        if self._trees is None:
            if not hasattr(local, "tree_manager_containers"):
                local.tree_manager_containers = {}
                local.tree_manager_locks = defaultdict(threading.Lock)
            self._trees = local.tree_manager_containers, local.tree_manager_locks
        local.tree_manager_containers, local.tree_manager_locks = self._trees
        self._adopted.done = True


_graphs = _Graphs()


def replaying() -> AbstractContextManager[object]:
    """Return a lock to hold from the beginning of a replay until what it returned has been used.

    Engines in several threads share the graphs' memory.
    """
    return _graphs.lock


def begin_replay() -> None:
    """Begin a step that replays, or a chain of them in which one reads what the one before it returned.

    What earlier steps returned may be overwritten from now on: what must live on has been copied.
    """
    _graphs.begin()


def mark_static(*values: object) -> None:
    """Tell CUDA graphs that tensors never move: weights, KV cache, step inputs. Without it every replay copies them."""
    for tensor in torch.utils._pytree.tree_leaves(values):
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static_address(tensor, guard=False)


def mark_dynamic(tensor: Tensor, *dims: int) -> None:
    """Tell the compiler that dimensions vary. None may be 1 in the call that is traced."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def mark_inputs(batch: Batch, *others: Tensor, replays: bool) -> None:
    """Mark the inputs of a step: their numbers of tokens, sequences, blocks and rows vary; a replay reads them where
    they are."""
    mark_dynamic(batch.block_tables, 1)
    for tensor in (*batch, *others):
        if isinstance(tensor, Tensor):
            mark_dynamic(tensor, 0)
    if replays:
        mark_static(batch, others)


def first_cause(error: BaseException) -> str:
    """Return what went wrong in one line: the compiler wraps it, and its own first line says nothing."""
    while inner := getattr(error, "inner_exception", None) or error.__cause__:
        error = inner
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {reason}"


def warn_eager(reason: str) -> None:
    """Warn that nothing is compiled."""
    warnings.warn(
        f"compilation failed, running eagerly and slower: {reason}"
        " (is a C++ compiler installed? `dispec env-check` tells; --compile off silences this)",
        RuntimeWarning,
        stacklevel=3,
    )
