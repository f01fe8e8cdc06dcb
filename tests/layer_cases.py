"""Random arguments for the ops of a layer on CUDA in 16 bits, and comparison with their oracles."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dispec.ops import reference

# Rotated queries of a rounded projection, in steps of their type: several roundings one after the other.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 8e-2}


class Shape(NamedTuple):
    """E, H, KV, D, F of a layer and BS of its pages."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    block_size: int = 16

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


class Product(NamedTuple):
    """A product of a layer: N and K of its weight, and what is around it."""

    features: int
    columns: int
    has_norm: bool = False
    adds: bool = False
    is_gated: bool = False
    has_bias: bool = False


def products(shape: Shape) -> dict[str, Product]:
    """Return the linear layers of a decoder layer: `linear_residual` if they add, else `fused_linear`."""
    attended = shape.heads * shape.head_dim
    return {
        "qkv": Product(shape.qkv, shape.hidden, has_norm=True, has_bias=True),  # where heads are normed
        "output": Product(shape.hidden, attended, adds=True),
        "gate_up": Product(2 * shape.intermediate, shape.hidden, has_norm=True, is_gated=True),
        "down": Product(shape.hidden, shape.intermediate, adds=True),
    }


def product_arguments(
    product: Product, rows: int, dtype: torch.dtype = torch.float16, device: str = "cpu", seed: int = 0
) -> tuple:
    """Arguments of `torch.ops.dispec.fused_linear`; the first three are the last of `linear_residual`."""
    torch.manual_seed(seed)
    features, columns, has_norm, _, is_gated, has_bias = product

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype)

    return (
        cast(torch.randn(rows, columns) * torch.linspace(0.3, 5 if has_norm else 1, rows)[:, None]),
        cast(torch.randn(features, columns) * columns**-0.5),
        cast(torch.randn(features)) if has_bias else None,
        cast(near_one(columns)) if has_norm else None,
        1e-6,
        is_gated,
    )


def expect_product(arguments: tuple, actual: Tensor, total: Tensor | None = None) -> None:
    """Compare a result with the oracle; total: what the product was added to."""
    expected = reference.linear(*(value.cpu() if isinstance(value, Tensor) else value for value in arguments))
    if total is not None:
        expected += total.cpu().double()
    assert actual.is_contiguous()
    assert actual.dtype == arguments[0].dtype
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.cpu().double(), expected, atol=tolerance, rtol=tolerance)


def near_one(size: int) -> Tensor:
    return 1 + 0.2 * torch.randn(size)


class Projection(NamedTuple):
    """Arguments of `torch.ops.dispec.qkv_rope_write` but for the pages, which a call changes."""

    before: tuple
    cache: tuple[Tensor, Tensor]
    after: tuple

    def arguments(self) -> tuple:
        """With the pages of the middle layer of a cache of their own."""
        return (*self.before, *(stacked.clone()[1] for stacked in self.cache), *self.after)


def make_projection(
    shape: Shape,
    rows: int,
    *,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    has_bias: bool = True,
    has_head_norms: bool = False,
    seed: int = 0,
) -> Projection:
    """A projection whose tokens go to random slots of the second of three layers; NaN is in every fourth page."""
    torch.manual_seed(seed)
    hidden, _, kv_heads, head_dim, _, block_size = shape

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype)

    num_blocks = math.ceil(rows / block_size) + 4
    keys = torch.randn(3, num_blocks, kv_heads, head_dim, block_size)
    values = torch.randn(3, num_blocks, kv_heads, block_size, head_dim)
    keys[:, ::4], values[:, ::4] = math.nan, math.nan
    angles = torch.randint(5000, (rows, 1)) * 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    slots = torch.randperm(num_blocks * block_size)[:rows].to(device, torch.int32)
    norms = tuple(cast(near_one(head_dim)) if has_head_norms else None for _ in range(2))
    before = (
        *product_arguments(Product(shape.qkv, hidden, has_norm=True, has_bias=has_bias), rows, dtype, device)[:5],
        angles.cos().to(device),
        angles.sin().to(device),
    )
    return Projection(before, (cast(keys), cast(values)), (slots, *norms))


def expect_projection(projection: Projection, arguments: tuple, query: Tensor) -> None:
    """Compare what a call with `arguments` returned, and the pages that it wrote, with the oracle."""
    on_host = [value.cpu() if isinstance(value, Tensor) else value for value in projection.arguments()]
    expected = reference.qkv_rope_write(*on_host)
    assert query.is_contiguous()
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(query.cpu().double(), expected, atol=tolerance, rtol=tolerance)
    slots = projection.after[0].cpu().long()
    block_size = projection.cache[0].shape[4]
    block, offset = slots // block_size, slots % block_size
    for at, order in ((7, (0, 3, 1, 2)), (8, (0, 2, 1, 3))):
        found, wanted, before = arguments[at].cpu(), on_host[at], projection.cache[at - 7].cpu()
        written, right = (pages.permute(order)[block, offset].double() for pages in (found, wanted))
        torch.testing.assert_close(written, right, atol=tolerance, rtol=tolerance)
        # Everything but the new tokens' slots has its very bits, in the other layers as well.
        restored = arguments[at]._base.cpu().clone()
        assert restored.shape == before.shape
        restored[1].permute(order)[block, offset] = before[1].permute(order)[block, offset]
        assert torch.equal(restored.view(torch.int16), before.view(torch.int16))
