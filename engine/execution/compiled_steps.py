"""Every `torch.compile` call of the steps, and the marks that the compiler needs on their tensors."""

import os
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
from dispec.engine.machine.cpu_cores import usable_cores
from dispec.layers.config import ModelConfig
from dispec.layers.steps import Vocabulary, decode_step, prefill_step
from dispec.layers.types import Batch


class StepFunctions(NamedTuple):
    """The steps of a model, compiled or not, as functions of weights, batch, cache and previous tokens."""

    decode: Callable[..., tuple[Tensor, Tensor]]
    prefill: Callable[..., tuple[Tensor, Tensor, Tensor]]


def eager_steps(config: ModelConfig, vocabulary: Vocabulary, decoder: ops.Decoder | None) -> StepFunctions:
    """Return the steps of a model, not compiled. decoder: as in `layers.model.hidden_states`."""

    def decode(weights: Any, batch: Any, kv_cache: Any, previous: Any) -> tuple[Tensor, Tensor]:
        return decode_step(weights, config, vocabulary, batch, kv_cache, previous, decoder)

    def prefill(weights: Any, batch: Any, kv_cache: Any, previous: Any) -> tuple[Tensor, Tensor, Tensor]:
        return prefill_step(weights, config, vocabulary, batch, kv_cache, previous, decoder)

    return StepFunctions(decode, prefill)


def compiled_steps(config: ModelConfig, vocabulary: Vocabulary, *, replays: bool) -> StepFunctions:
    """Return the steps of a model, each of which is compiled as one graph when it is first called."""
    eager = eager_steps(config, vocabulary, None)
    return StepFunctions(*(compile_function(function, replays=replays) for function in eager))


def compile_function(function: Callable[..., Any], *, replays: bool) -> Callable[..., Any]:
    """Return a function that is compiled when it is first called. replays: as CUDA graphs, one for each shape."""
    _configure()
    assert isinstance(function, FunctionType)
    # The compiler keeps its graphs as long as the function's code object. A copy is freed with the engine.
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copy, mode="reduce-overhead" if replays else None, fullgraph=True)


def without_guards(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return the code that the compiler made of a function of `compile_function`; the function itself if it has several
    graphs.

    It must be called with inputs for which the guards hold, as they do for every shape that was recorded through the
    function. Guards and the compiler's wrapper take the host 0.06 ms a call in a tight loop and more between the other
    work of a step, which evicts them from its caches (H200 machine, torch 2.11).
    """
    function = getattr(compiled, "_torchdynamo_orig_callable", None)
    if function is None:
        return compiled
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)
    if len(entries) != 1:
        return compiled
    code = FunctionType(
        entries[0].code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    code.__dict__["compiled"] = compiled  # the graph lives as long as the function that was compiled
    return code


def _configure() -> None:
    # Each engine of a process, and each kind of sampling, compiles another graph of the same function.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    from torch._inductor import config

    # Recording a graph for each shape is intended.
    config.triton.cudagraph_dynamic_shape_warn_limit = None
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        # Inductor starts one process for each core of the affinity mask, also under a smaller CPU quota.
        config.compile_threads = min(config.compile_threads or 1, usable_cores())
    # An engine may change from eager to compiled steps during a request: both must round alike.
    config.emulate_precision_casts = True


# torch keeps CUDA graphs for each thread. All threads of this process replay those of the first one.
_lock = threading.RLock()
_thread = threading.local()
_shared_trees: dict[str, Any] = {}


def replay_lock() -> AbstractContextManager[object]:
    """Return the lock to hold from the beginning of a replay until its results were used.

    Engines in several threads share the graphs' memory.
    """
    return _lock


def begin_replay() -> None:
    """Begin a step that replays, or a chain of steps each of which reads the results of the one before it.

    It may overwrite the results of earlier steps: those that are still needed must have been copied.
    """
    if not hasattr(_thread, "has_shared_trees"):
        _share_trees()
        _thread.has_shared_trees = True
    torch.compiler.cudagraph_mark_step_begin()


def _share_trees() -> None:
    from torch._inductor import cudagraph_trees

    local = cudagraph_trees.local
    if not _shared_trees:
        if not hasattr(local, "tree_manager_containers"):
            local.tree_manager_containers = {}
            local.tree_manager_locks = defaultdict(threading.Lock)
        _shared_trees.update(containers=local.tree_manager_containers, locks=local.tree_manager_locks)
    local.tree_manager_containers, local.tree_manager_locks = _shared_trees["containers"], _shared_trees["locks"]


def mark_static(*values: object) -> None:
    """Mark tensors that never move: weights, KV cache, step inputs. Every replay would copy unmarked ones."""
    for tensor in torch.utils._pytree.tree_leaves(values):
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static_address(tensor, guard=False)


def mark_dynamic(tensor: Tensor, *dims: int) -> None:
    """Mark dimensions that vary. None of them may be 1 in the call that is traced."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def mark_inputs(batch: Batch, *others: Tensor, replays: bool) -> None:
    """Mark the inputs of a step: all their sizes vary, and a replay reads them in place."""
    mark_dynamic(batch.block_tables, 1)
    for tensor in (*batch, *others):
        if isinstance(tensor, Tensor):
            mark_dynamic(tensor, 0)
    if replays:
        mark_static(batch, others)


def root_cause(error: BaseException) -> str:
    """Return the innermost error in one line: the first line of the compiler's own error gives no reason."""
    while inner := getattr(error, "inner_exception", None) or error.__cause__:
        error = inner
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {reason}"


def warn_about_eager_fallback(reason: str) -> None:
    """Warn that steps run eagerly, with the reason."""
    warnings.warn(
        f"compilation failed, running eagerly and slower: {reason}"
        " (is a C++ compiler installed? `dispec env-check` tells; --compile off silences this)",
        RuntimeWarning,
        stacklevel=3,
    )
