"""How large the pieces of memory are that something asks torch for, inside its operations as well."""

import itertools
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from dispec.layers.types import KVCache, Weights, unstack_layers


def largest_allocation(call: Callable[[], object]) -> int:
    """Bytes of the largest piece that torch's allocator on the CPU gave out during the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    assert found.profiler is not None
    events = found.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


def peak_allocation(call: Callable[[], object]) -> int:
    """Bytes that torch's allocator on the CPU had given out at most at once during the call, of those it gave in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
    assert result is not None  # which keeps what the call made
    assert found.profiler is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def smallest_matrix_or_cache(weights: Weights, kv_cache: KVCache) -> int:
    """Bytes of the smallest weight matrix or half of a layer's cache: what no step has a reason to copy."""
    tensors = tree_leaves(
        (weights.embedding, unstack_layers(weights.layers), weights.lm_head, kv_cache.keys[0], kv_cache.values[0])
    )
    return min(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.dim() > 1)
