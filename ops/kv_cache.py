"""Writes to the paged KV cache and copies of its blocks.

Both ops mutate the cache and return nothing. They are opaque to the compiler: an in-graph scatter through a view makes
torch 2.11 copy the whole cache on every step.

Ops take the cache of all layers and the number of a layer, not a view of the layer: with a symbolic number of blocks
the compiler of torch 2.13 has every layer write to the first one's pages.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec.ops.registration import register, returns_nothing


def write_kv(
    keys: Float[Tensor, "*L NB KV D BS"],
    values: Float[Tensor, "*L NB KV BS D"],
    key: Float[Tensor, "T KV D"],
    value: Float[Tensor, "T KV D"],
    slot_mapping: Int[Tensor, "T"],
    layer: int | None = None,
) -> None:
    """Store token t's key and value at slot `slot_mapping[t]` (block * BS + offset), in place.

    layer: the layer to write, where keys and values are those of all layers. Slots must be in [0, NB * BS) and, outside
    block 0, distinct: block 0 takes the padding and is never read. `key` and `value` may be strided views in their
    first two dimensions.
    """
    torch.ops.dispec.write_kv(keys, values, key, value, slot_mapping, layer)


def copy_blocks(
    keys: Float[Tensor, "L NB KV D BS"],
    values: Float[Tensor, "L NB KV BS D"],
    source: Int[Tensor, "N"],
    destination: Int[Tensor, "N"],
) -> None:
    """Copy block `source[i]` to block `destination[i]` in all layers, in place. No destination may also be a source."""
    torch.ops.dispec.copy_blocks(keys, values, source, destination)


def pages_of_layer(keys: Tensor, values: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
    """Return the keys [NB, KV, D, BS] and values [NB, KV, BS, D] of a layer; with None the tensors are a layer's."""
    return (keys, values) if layer is None else (keys[layer], values[layer])


def _write_kv_cpu(
    keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor, layer: int | None = None
) -> None:
    keys, values = pages_of_layer(keys, values, layer)
    block_size = keys.shape[3]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    keys.permute(0, 3, 1, 2)[block, offset] = key
    values.permute(0, 2, 1, 3)[block, offset] = value


def _write_kv_cuda(
    keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slots: Tensor, layer: int | None = None
) -> None:
    from dispec.ops.triton.kv_cache import write_kv as kernel

    kernel(*pages_of_layer(keys, values, layer), key, value, slots)


def _copy_blocks(keys: Tensor, values: Tensor, source: Tensor, destination: Tensor) -> None:
    keys[:, destination] = keys[:, source]
    values[:, destination] = values[:, source]


register(
    "write_kv(Tensor(a!) keys, Tensor(b!) values, Tensor key, Tensor value, Tensor slot_mapping,"
    " int? layer=None) -> ()",
    returns_nothing,
    cpu=_write_kv_cpu,
    cuda=_write_kv_cuda,
)
register(
    "copy_blocks(Tensor(a!) keys, Tensor(b!) values, Tensor source, Tensor destination) -> ()",
    returns_nothing,
    cpu=_copy_blocks,
    cuda=_copy_blocks,
)
