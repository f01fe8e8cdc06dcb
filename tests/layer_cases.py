"""Random layers for `ops.decoder_layer`, their sequences in shuffled pages, NaN wherever no context reaches."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ops import reference


class Shape(NamedTuple):
    """E, H, KV, D, F of a layer and BS of its pages."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    block_size: int = 16


class Layer(NamedTuple):
    """Arguments of `torch.ops.dispec.decoder_layer` but for the pages, which a call changes; the rows that count."""

    before: tuple
    pages: tuple[Tensor, Tensor]
    after: tuple
    rows: int

    def arguments(self) -> tuple:
        """With pages of their own."""
        return (*self.before, *(tensor.clone() for tensor in self.pages), *self.after)


def make_layer(
    shape: Shape,
    contexts: list[int],
    query_len: int = 1,
    *,
    padding: int = 0,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    qkv_bias: bool = True,
    output_bias: bool = False,
    head_norms: bool = False,
    columns: int = 0,
    seed: int = 0,
) -> Layer:
    """A layer and a step of sequences with `contexts` tokens, the step's own included, then `padding` sequences."""
    torch.manual_seed(seed)
    hidden, heads, kv_heads, head_dim, intermediate, block_size = shape
    qkv = (heads + 2 * kv_heads) * head_dim
    batch = len(contexts) + padding
    tokens = batch * query_len

    def weight(features: int, size: int) -> Tensor:
        return torch.randn(features, size) * size**-0.5

    def near_one(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size)

    needed = [math.ceil(context / block_size) for context in contexts]
    num_blocks = sum(needed) + 3
    keys = torch.full((num_blocks, kv_heads, head_dim, block_size), math.nan)
    values = torch.full((num_blocks, kv_heads, block_size, head_dim), math.nan)
    keys[0], values[0] = 0.0, 0.0
    free = (torch.randperm(num_blocks - 1) + 1).tolist()
    # Entries past a context point outside the cache: they must not be followed.
    tables = torch.full((batch, max(*needed, 2, columns) + 1), 2**30, dtype=torch.int32)
    tables[len(contexts) :, 0] = 0
    slots, positions = [], []
    for sequence, context in enumerate(contexts):
        blocks = [free.pop() for _ in range(needed[sequence])]
        tables[sequence, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for column, block in enumerate(blocks):
            used = min(block_size, context - query_len - column * block_size)
            if used > 0:
                keys[block, :, :, :used] = torch.randn(kv_heads, head_dim, used)
                values[block, :, :used] = torch.randn(kv_heads, used, head_dim)
        for position in range(context - query_len, context):
            positions.append(position)
            slots.append(blocks[position // block_size] * block_size + position % block_size)
    slots += [0] * (padding * query_len)
    positions += [0] * (padding * query_len)
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.tensor(positions)[:, None] * frequencies

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, dtype)

    before = (
        cast(torch.randn(tokens, hidden) * torch.linspace(0.3, 5, tokens)[:, None]),
        cast(near_one(hidden)),
        cast(weight(qkv, hidden)),
        cast(torch.randn(qkv)) if qkv_bias else None,
        cast(near_one(head_dim)) if head_norms else None,
        cast(near_one(head_dim)) if head_norms else None,
        cast(weight(hidden, heads * head_dim)),
        cast(torch.randn(hidden)) if output_bias else None,
        cast(near_one(hidden)),
        cast(weight(2 * intermediate, hidden)),
        cast(weight(hidden, intermediate)),
        1e-6,
        angles.cos().to(device),
        angles.sin().to(device),
    )
    integers = (
        torch.tensor(slots, dtype=torch.int32),
        tables,
        torch.arange(batch + 1, dtype=torch.int32) * query_len,
        torch.tensor(contexts + [query_len] * padding, dtype=torch.int32),
    )
    after = (*(tensor.to(device) for tensor in integers), heads, intermediate, head_dim**-0.5)
    return Layer(before, (keys.to(device, dtype), values.to(device, dtype)), after, len(contexts) * query_len)


def expect_layer(layer: Layer, actual: Tensor, keys: Tensor, values: Tensor, tolerance: float) -> None:
    """Compare what a layer returned, and the pages that it wrote, with the oracle; padding and its block excepted."""
    on_host = [value.cpu() if isinstance(value, Tensor) else value for value in layer.arguments()]
    expected_keys, expected_values = on_host[14:16]
    expected = reference.decoder_layer(*on_host)
    assert actual.is_contiguous()
    assert actual.dtype == expected.dtype
    rows = slice(layer.rows)
    torch.testing.assert_close(actual[rows].cpu().double(), expected[rows].double(), atol=tolerance, rtol=tolerance)
    slots = layer.after[0][rows].cpu().long()
    block_size = layer.pages[0].shape[3]
    block, offset = slots // block_size, slots % block_size
    for found, wanted, untouched, order in (
        (keys.cpu(), expected_keys, layer.pages[0].cpu(), (0, 3, 1, 2)),
        (values.cpu(), expected_values, layer.pages[1].cpu(), (0, 2, 1, 3)),
    ):
        written, right = found.permute(order)[block, offset], wanted.permute(order)[block, offset]
        torch.testing.assert_close(written.double(), right.double(), atol=tolerance, rtol=tolerance)
        # Everything but the new tokens' slots has its very bits.
        restored = found.clone()
        restored.permute(order)[block, offset] = untouched.permute(order)[block, offset]
        assert torch.equal(restored[1:].view(torch.int16), untouched[1:].view(torch.int16))
