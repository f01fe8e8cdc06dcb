"""The size of the KV cache, its allocation, and other memory, in use or free."""

import ctypes
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from dispec.engine.dtypes import DTYPES
from dispec.engine.machine.memory import usable_memory
from dispec.engine.options import EngineOptions, parse_bytes
from dispec.layers.config import ModelConfig
from dispec.layers.types import KVCache, Weights
from dispec.ops.kv_cache import scale_rows

CPU_SHARE_OF_FREE = 0.25


@dataclass(frozen=True)
class KVPlan:
    """The blocks of the KV cache. `num_blocks` includes the padding block. reason: what limits their number."""

    num_blocks: int
    block_size: int
    block_bytes: int
    max_model_len: int
    reason: str

    @property
    def num_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size


def plan_kv_cache(
    config: ModelConfig,
    options: EngineOptions,
    device: torch.device,
    free_bytes: int,
    draft: ModelConfig | None = None,
) -> KVPlan:
    """Choose the number of blocks and the longest sequence. A draft model has its own part of each block.

    Raises ValueError if `max_model_len` exceeds the model's own limit, if a sequence of that length does not fit in
    the cache, or if the cache asked for does not fit in memory.
    """
    block_size = options.block_size
    models = [model for model in (config, draft) if model]
    block_bytes = sum(_block_bytes(model, block_size, kv_dtype(options)) for model in models)
    limit = min(model.max_position_embeddings for model in (config, draft) if model)
    if options.max_model_len is not None and options.max_model_len > limit:
        raise ValueError(f"max_model_len is {options.max_model_len}, the model's limit is {limit}")
    wanted_len = options.max_model_len or limit
    useful_blocks = options.max_num_seqs * -(-wanted_len // block_size) + 1
    given = parse_bytes(options.kv_cache_memory)
    if given is not None:
        if given > free_bytes:
            raise ValueError(f"kv_cache_memory is {format_bytes(given)}, only {format_bytes(free_bytes)} are free")
        num_blocks, reason = given // block_bytes, "kv_cache_memory"
    elif device.type == "cuda":
        num_blocks, reason = free_bytes // block_bytes, f"free under {options.gpu_memory_utilization:.0%} of the device"
    else:
        num_blocks = int(free_bytes * CPU_SHARE_OF_FREE) // block_bytes
        reason = (
            f"{CPU_SHARE_OF_FREE:.0%} of the free memory, at most max_num_seqs ({options.max_num_seqs}) full contexts"
        )
        num_blocks = min(num_blocks, useful_blocks)
    fits = (num_blocks - 1) * block_size
    if fits < 2 or (options.max_model_len is not None and fits < options.max_model_len):
        needed = format_bytes((-(-wanted_len // block_size) + 1) * block_bytes)
        raise ValueError(
            f"max_model_len of {wanted_len} tokens needs a KV cache of {needed}, there is"
            f" {format_bytes(max(0, num_blocks) * block_bytes)} ({reason}):"
            " raise kv_cache_memory or lower max_model_len"
        )
    return KVPlan(num_blocks, block_size, block_bytes, min(wanted_len, fits), reason)


def kv_cache_bytes(config: ModelConfig, plan: KVPlan, dtype: torch.dtype) -> int:
    """Return the bytes of the KV cache of all layers."""
    return plan.num_blocks * _block_bytes(config, plan.block_size, dtype)


def _block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    page = (config.head_dim + scale_rows(dtype)) * block_size * dtype.itemsize
    return 2 * config.num_layers * config.num_kv_heads * page


def kv_dtype(options: EngineOptions) -> torch.dtype:
    """Return the dtype of keys and values."""
    quantized = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
    return quantized.get(options.kv_cache_dtype) or DTYPES[options.dtype]


def allocate_kv_cache(
    config: ModelConfig,
    plan: KVPlan,
    dtype: torch.dtype,
    device: torch.device,
    memory: Tensor | None = None,
) -> KVCache:
    """Return a zeroed KV cache. On CPU the system provides memory only as blocks are first written.

    memory: `kv_cache_bytes` zeroed bytes to use, which other processes can read; None allocates them.
    """
    pages = (config.num_layers, plan.num_blocks, config.num_kv_heads)
    rows = config.head_dim + scale_rows(dtype)
    keys, values = (*pages, rows, plan.block_size), (*pages, plan.block_size, rows)
    if device.type != "cpu":
        return KVCache(*(torch.zeros(shape, dtype=dtype, device=device) for shape in (keys, values)))
    if memory is None:
        # numpy allocates zeros with calloc: pages take no memory until they are touched. numpy asks for huge pages.
        memory = torch.from_numpy(np.zeros(kv_cache_bytes(config, plan, dtype), dtype=np.uint8))
    # Two storages over the same memory: the compiler copies inputs that share one.
    halves = (from_dlpack(to_dlpack(half)) for half in memory[: kv_cache_bytes(config, plan, dtype)].chunk(2))
    return KVCache(*(half.view(dtype).view(shape) for half, shape in zip(halves, (keys, values), strict=True)))


def free_memory(device: torch.device, utilization: float) -> int:
    """Return the free bytes: on CUDA up to `utilization` of the device, on CPU those of the machine or the cgroup."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free - int(total * (1 - utilization)))
    return usable_memory().available


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the used and all bytes of a GPU, those of other processes included; zeros for a CPU."""
    if device.type != "cuda":
        return 0, 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total


def weight_bytes(weights: Weights) -> int:
    """Return the bytes of all weights. A tensor that is used in two places counts once."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(weights) if isinstance(leaf, Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in {id(leaf): leaf for leaf in leaves}.values())


def return_freed_memory() -> None:
    """Return freed memory to the system. glibc keeps it, and loading frees much in small pieces."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def format_bytes(size: float) -> str:
    """Return bytes as text such as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
