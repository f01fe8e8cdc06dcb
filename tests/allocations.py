"""How large the pieces of memory are that something asks torch for, inside its operations as well."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from engine import LLM


def largest_allocation(call: Callable[[], object]) -> int:
    """Bytes of the largest piece that torch's allocator on the CPU gave out during the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    assert found.profiler is not None
    events = found.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


def smallest_matrix_or_cache(llm: LLM) -> int:
    """Bytes of the smallest weight matrix or half of a layer's cache: what no step has a reason to copy."""
    runner = llm.engine.runner
    tensors = tree_leaves((runner.weights, runner.kv_cache))
    return min(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.dim() > 1)
