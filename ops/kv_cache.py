"""Writes to the paged KV cache and copies of its blocks.

Both ops mutate the cache and return nothing. They are opaque to the compiler: an in-graph scatter through a view makes
torch 2.11 copy the whole cache on every step.

Keys and values may be quantised to int8 or e4m3, each token's of each head with a scale of its own: then what a token
stores depends on that token alone, not on how a prompt was cut into steps. A page of BS tokens has D * BS codes in the
usual order, then BS scales in float32, so DP, the D of its shape, is larger by 4 bytes. Blocks are copied and sent as
bytes.

Ops take the cache of all layers and the number of a layer, not a view of the layer: with a symbolic number of blocks
the compiler of torch 2.13 has every layer write to the first one's pages.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dispec.ops.registration import register, returns_nothing

# The largest code of a quantised cache: a token's scale is its largest magnitude over this.
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def scale_rows(dtype: torch.dtype) -> int:
    """Return by how much the scales enlarge D in the shape of a page: 0 for a cache that is not quantised."""
    return torch.float32.itemsize if dtype in LARGEST_CODE else 0


def codes_and_scales(
    keys: Shaped[Tensor, "NB KV DP BS"], values: Shaped[Tensor, "NB KV BS DP"]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a quantised layer's keys [NB, KV, D, BS], their scales [NB, KV, BS], its values [NB, KV, BS, D] and their
    scales, as views."""
    block_size, head_dim = keys.shape[3], keys.shape[-2] - scale_rows(keys.dtype)

    def split(pages: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        flat = pages.flatten(2)
        size = head_dim * block_size
        return flat[..., :size].unflatten(2, shape), flat.view(torch.uint8)[..., size:].view(torch.float32)

    return split(keys, (head_dim, block_size)), split(values, (block_size, head_dim))


def quantize_heads(x: Float[Tensor, "T KV D"], dtype: torch.dtype) -> tuple[Tensor, Float[Tensor, "T KV"]]:
    """Return each head's codes and scale: the largest magnitude over the largest code, and 0 where all is 0."""
    largest = x.float().abs().amax(dim=-1)
    inverse = LARGEST_CODE[dtype] / largest.clamp(min=2**-100)  # so that it is finite
    codes = x.float() * inverse[..., None]
    return (codes.round() if dtype is torch.int8 else codes).to(dtype), largest / LARGEST_CODE[dtype]


def write_kv(
    keys: Shaped[Tensor, "*L NB KV DP BS"],
    values: Shaped[Tensor, "*L NB KV BS DP"],
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
    keys: Shaped[Tensor, "L NB KV DP BS"],
    values: Shaped[Tensor, "L NB KV BS DP"],
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
    if keys.dtype in LARGEST_CODE:
        dtype = keys.dtype
        (keys, key_scales), (values, value_scales) = codes_and_scales(keys, values)
        key, key_scales.permute(0, 2, 1)[block, offset] = quantize_heads(key, dtype)
        value, value_scales.permute(0, 2, 1)[block, offset] = quantize_heads(value, dtype)
        if dtype is not torch.int8:  # torch has no indexed assignment of e4m3
            keys, values, key, value = (part.view(torch.uint8) for part in (keys, values, key, value))
    keys.permute(0, 3, 1, 2)[block, offset] = key
    values.permute(0, 2, 1, 3)[block, offset] = value


def _write_kv_cuda(
    keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slots: Tensor, layer: int | None = None
) -> None:
    from dispec.ops.triton.kv_cache import write_kv as kernel

    kernel(*pages_of_layer(keys, values, layer), key, value, slots)


def _copy_blocks(keys: Tensor, values: Tensor, source: Tensor, destination: Tensor) -> None:
    if keys.dtype in LARGEST_CODE:  # torch has no indexed assignment of e4m3
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
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
