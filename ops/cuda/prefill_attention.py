"""Attention of any number of queries per sequence over pages, for Hopper: the contract of
`ops.triton.prefill_attention` for 16-bit pages.
"""

import math

import torch
from torch import Tensor

from dispec.ops.cuda.library import Kernel, kernel, tensor_map

HEAD_DIMS = (64, 128)
BLOCK_SIZES = (16, 32, 64)
# As in prefill_attention.cu: rows of a tile, threads of a block, positions and copies of a step in shared memory.
_TILE_ROWS, _THREADS = 128, 384
_STEP_POSITIONS, _STAGES = 128, 2
# Sharing a tile costs as much as this many positions of it, measured on an H200 (2.7 µs).
_EXCHANGE_POSITIONS = 300
_NEVER = 2**31


def constants(head_dim: int, group: int, block_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the macros of the kernel's source."""
    macros = {"HEAD_DIM": head_dim, "GROUP": group, "BLOCK_SIZE": block_size}
    return macros | {"FLOAT16": 1} if dtype is torch.float16 else macros


def shared_bytes(head_dim: int) -> int:
    """Return the shared memory of a block: queries, keys, values, results of the other block, barriers, alignment."""
    rows = _TILE_ROWS + 2 * _STAGES * _STEP_POSITIONS
    return 2 * head_dim * rows + 512 * (head_dim // 2 + 4) + 8 * (5 + 4 * _STAGES) + 1024


def min_shared_context(num_tokens: int, num_tiles: int, multiprocessors: int) -> int:
    """Return the longest context of a step from which two multiprocessors share the positions of a tile.

    Sharing pays where tiles leave multiprocessors without work in the last round, and is worth half a tile for every
    round of half tiles that it saves. num_tiles: of all key heads.
    """
    pairs = multiprocessors // 2
    rounds, shared_rounds = math.ceil(num_tiles / (2 * pairs)), math.ceil(num_tiles / pairs)
    saved = 2 * rounds - shared_rounds
    # In a prompt's first chunk tiles see half of the context on average.
    return num_tokens // 2 + 2 * _EXCHANGE_POSITIONS * shared_rounds // saved if saved else _NEVER


def has_kernel(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether `prefill` takes such queries [T, H, D], keys [NB, KV, D, BS] and values: the kernel is built."""
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and keys.dtype is query.dtype
        and query.shape[2] in HEAD_DIMS
        and keys.shape[3] in BLOCK_SIZES
        and query.shape[1] // keys.shape[1] <= _TILE_ROWS
        and all(stride % 8 == 0 for stride in query.stride()[:2])
        and all(tensor.data_ptr() % 16 == 0 for tensor in (query, keys, values))
        and _kernel(query, keys) is not None
    )


def _kernel(query: Tensor, keys: Tensor) -> Kernel | None:
    macros = constants(query.shape[2], query.shape[1] // keys.shape[1], keys.shape[3], query.dtype)
    return kernel("prefill_attention.cu", "prefill_attention", macros, query.device)


def _tensor_maps(query: Tensor, keys: Tensor, values: Tensor) -> tuple[object, object, object]:
    """Return how the kernel copies the queries of a tile, a page of keys and a page of values."""
    num_tokens, num_heads, head_dim = query.shape
    num_blocks, kv_heads, _, block_size = keys.shape
    group = num_heads // kv_heads
    query_map = tensor_map(
        query.data_ptr(),
        query.dtype,
        (head_dim, group, num_tokens, kv_heads),
        (2 * query.stride(1), 2 * query.stride(0), 2 * group * query.stride(1)),
        (64, group, _TILE_ROWS // group, 1),
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
    return query_map, key_map, value_map


def prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    shared_from: int | None = None,
) -> Tensor:
    """Compute `ops.triton.prefill_attention.prefill`, with arguments as there, for which `has_kernel` must be true.

    shared_from: replaces `min_shared_context` in tests and tuning.
    """
    num_tokens, num_heads, head_dim = query.shape
    batch, (num_blocks, kv_heads) = block_tables.shape[0], keys.shape[:2]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_tokens == 0 or batch == 0:
        return output
    built = _kernel(query, keys)
    assert built is not None
    block_tables, query_start, context_lens = (
        given.to(torch.int32) for given in (block_tables, query_start, context_lens)
    )
    num_tiles = num_tokens // (_TILE_ROWS // (num_heads // kv_heads)) + batch
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    if shared_from is None:
        shared_from = min_shared_context(num_tokens, num_tiles * kv_heads, multiprocessors)
    built.launch(
        (2 * min(num_tiles * kv_heads, multiprocessors // 2), 1, 1),
        (_THREADS, 1, 1),
        shared_bytes(head_dim),
        *_tensor_maps(query, keys, values),
        output,
        block_tables,
        query_start,
        context_lens,
        block_tables.stride(0),
        num_blocks,
        batch,
        num_tiles,
        kv_heads,
        shared_from,
        scale * math.log2(math.e),
    )
    return output
