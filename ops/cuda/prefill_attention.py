"""Attention of any number of queries per sequence over pages, for Hopper: the contract of
`ops.triton.prefill_attention` for 16-bit pages.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dispec.ops.cuda.library import Kernel, kernel, tensor_map

HEAD_DIMS = (64, 128)
BLOCK_SIZES = (16, 32, 64)


class FlashConfig(NamedTuple):
    """How to build and launch the kernel.

    warpgroups: 64 rows of a tile each, 2 or 3. block_n: positions of a step. stages: steps in shared memory. overlap,
    turns: as in prefill_attention.cu. persistent: launch a block for each multiprocessor, not for each tile.
    """

    warpgroups: int
    block_n: int
    stages: int
    overlap: int = 1
    turns: int = 1
    persistent: bool = True
    split: int = 1


WIDE = FlashConfig(warpgroups=3, block_n=64, stages=4)
NARROW = FlashConfig(warpgroups=2, block_n=128, stages=2)


def constants(head_dim: int, group: int, block_size: int, dtype: torch.dtype, config: FlashConfig) -> dict[str, int]:
    """Return the macros of the kernel's source."""
    return {
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "WARPGROUPS": config.warpgroups,
        "BLOCK_N": config.block_n,
        "STAGES": config.stages,
        "OVERLAP": config.overlap,
        "TURNS": config.turns,
        "SPLIT": config.split,
        **({"FLOAT16": 1} if dtype is torch.float16 else {}),
    }


def shared_bytes(head_dim: int, config: FlashConfig) -> int:
    """Return the shared memory of a block: queries, keys and values, barriers, and up to 1 KiB of alignment."""
    rows = 64 * config.warpgroups + 2 * config.stages * config.block_n
    exchange = 128 * 4 * (head_dim // 2 + 4) if config.split == 2 else 0
    return 2 * head_dim * rows + exchange + 8 * (4 + 4 * config.stages) + 1024


def has_kernel(query: Tensor, keys: Tensor, values: Tensor, config: FlashConfig = NARROW) -> bool:
    """Return whether `prefill` takes such queries [T, H, D], keys [NB, KV, D, BS] and values: the kernel is built."""
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and keys.dtype is query.dtype
        and query.shape[2] in HEAD_DIMS
        and keys.shape[3] in BLOCK_SIZES
        and query.shape[1] // keys.shape[1] <= 64 * config.warpgroups
        and all(stride % 8 == 0 for stride in query.stride()[:2])
        and all(tensor.data_ptr() % 16 == 0 for tensor in (query, keys, values))
        and _kernel(query, keys, config) is not None
    )


def _kernel(query: Tensor, keys: Tensor, config: FlashConfig) -> Kernel | None:
    macros = constants(query.shape[2], query.shape[1] // keys.shape[1], keys.shape[3], query.dtype, config)
    return kernel("prefill_attention.cu", "prefill_attention", macros, query.device)


def prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    config: FlashConfig | None = None,
) -> Tensor:
    """Compute `ops.triton.prefill_attention.prefill`, with arguments as there, for which `has_kernel` must be true.

    config: replaces the choice by shapes in tests and tuning.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_blocks, kv_heads, _, block_size = keys.shape
    batch, group = block_tables.shape[0], num_heads // keys.shape[1]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_tokens == 0 or batch == 0:
        return output
    if config is None:
        config = NARROW
    built = _kernel(query, keys, config)
    assert built is not None
    tokens = 64 * config.warpgroups // group
    num_tiles = num_tokens // tokens + batch
    query_map = tensor_map(
        query.data_ptr(),
        query.dtype,
        (head_dim, group, num_tokens, kv_heads),
        (2 * query.stride(1), 2 * query.stride(0), 2 * group * query.stride(1)),
        (64, group, tokens, 1),
        128,
    )
    key_map = tensor_map(
        keys.data_ptr(),
        keys.dtype,
        (block_size, head_dim, kv_heads, num_blocks),
        (2 * block_size, 2 * keys.stride(1), 2 * keys.stride(0)),
        (block_size, head_dim, 1, 1),
        2 * block_size,
    )
    value_map = tensor_map(
        values.data_ptr(),
        values.dtype,
        (64, block_size, head_dim // 64, kv_heads, num_blocks),
        (2 * head_dim, 128, 2 * values.stride(1), 2 * values.stride(0)),
        (64, block_size, head_dim // 64, 1, 1),
        128,
    )
    tiles = num_tiles * kv_heads
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    blocks = config.split * (min(tiles, multiprocessors // config.split) if config.persistent else tiles)
    built.launch(
        (blocks, 1, 1),
        (128 * config.warpgroups + 128, 1, 1),
        shared_bytes(head_dim, config),
        query_map,
        key_map,
        value_map,
        output,
        block_tables,
        query_start,
        context_lens,
        block_tables.stride(0),
        num_blocks,
        batch,
        num_tiles,
        kv_heads,
        scale * math.log2(math.e),
    )
    return output
