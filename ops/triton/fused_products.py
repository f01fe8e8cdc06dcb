"""The four products of a layer for few rows, each with what stands before and after it in one kernel.

Queries, keys and values are normed in, rotated and written to their pages; gate and up become one; the attention's
output and the MLP's are added to the residual. Weights are read once and decide how long each takes.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.norm import Norm
from ops.triton.products import dotted, product, start_next
from ops.triton.tuning import FewRowsConfig


@triton.jit
@no_type_check
def add_kernel(
    output,
    partial,
    arrivals,
    x,
    weight,
    bias,
    residual,
    norm,
    rows,
    N,
    x_stride,
    residual_stride,
    eps,
    tiles_per_split,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`norm(x) @ weight.T + bias + residual`. One program: BLOCK_N features of all rows over one split of the columns.

    Grid (ceil(N / BLOCK_N), SPLITS). Where the columns are split, each program leaves its part in `partial`
    [SPLITS, T, N], float32, and the last of a block of features to arrive, by the counter in `arrivals` (zero before),
    adds the parts in their order: the same bits whoever is last.
    """
    start_next(EARLY)
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    is_feature = feature < N
    mask = (row[:, None] < rows) & is_feature[None, :]
    if SPLITS > 1:
        split = tl.program_id(1)
        first = split * tiles_per_split
        last = tl.minimum(first + tiles_per_split, (K + BLOCK_K - 1) // BLOCK_K)
        part = dotted(
            weight, feature, is_feature, x, x_stride, rows, norm, eps, first, last,
            K, BLOCK_M, BLOCK_N, BLOCK_K, NORM, EARLY,
        )  # fmt: skip
        at = row[:, None] * N + feature[None, :]
        tl.store(partial + split * rows * N + at, part, mask=mask)
        tl.debug_barrier()  # every thread's part is stored before one of them tells so
        arrived = tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel")
        if arrived != SPLITS - 1:
            return
        result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for index in tl.static_range(SPLITS):
            result += tl.load(partial + index * rows * N + at, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        result = product(
            weight, feature, is_feature, x, x_stride, rows, norm, eps,
            K, BLOCK_M, BLOCK_N, BLOCK_K, TENSOR_CORES, NORM, EARLY,
        )  # fmt: skip
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        before = tl.load(residual + row[:, None] * residual_stride + feature[None, :], mask=mask, other=0.0)
        result += before.to(tl.float32)
    tl.store(output + row[:, None] * N + feature[None, :], result.to(output.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def gate_kernel(
    output,
    arrivals,
    x,
    weight,
    norm,
    rows,
    F,
    x_stride,
    eps,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ARRIVALS: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`silu(gate) * up` of the two halves of `norm(x) @ weight.T`. One program: BLOCK_N / 2 features of all rows.

    Grid (ceil(F / (BLOCK_N / 2)),). Rows of the weight [2 F, K] are taken in turns from the gate and from up. Sets the
    ARRIVALS counters of the next kernel to zero, which saves a launch that would.
    """
    start_next(EARLY)
    lane = tl.arange(0, BLOCK_N)
    pair = tl.program_id(0) * (BLOCK_N // 2) + lane // 2
    row = tl.arange(0, BLOCK_M)
    result = product(
        weight, lane % 2 * F + pair, pair < F, x, x_stride, rows, norm, eps,
        K, BLOCK_M, BLOCK_N, BLOCK_K, TENSOR_CORES, NORM, EARLY,
    )  # fmt: skip
    if ARRIVALS > 0:  # noqa: SIM102 (a constant: the whole branch goes away)
        if tl.program_id(0) == 0:
            tl.store(arrivals + tl.arange(0, ARRIVALS), tl.zeros([ARRIVALS], tl.int32))
    gate, up = tl.split(tl.reshape(result, [BLOCK_M, BLOCK_N // 2, 2]))
    result = gate / (1.0 + tl.exp(-gate)) * up
    feature = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    mask = (row[:, None] < rows) & (feature[None, :] < F)
    tl.store(output + row[:, None] * F + feature[None, :], result.to(output.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def rotate_kernel(
    query,
    keys,
    values,
    slot_mapping,
    cosine,
    sine,
    x,
    weight,
    bias,
    norm,
    rows,
    x_stride,
    eps,
    keys_block_stride,
    keys_head_stride,
    values_block_stride,
    values_head_stride,
    K: tl.constexpr,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Queries [T, H, D], rotated, and keys, rotated, and values in their pages, from `norm(x) @ weight.T + bias`.

    One program: BLOCK_N / 2 pairs of dimensions that rotate together, of all rows. Grid
    (ceil((H + 2 KV) * D / BLOCK_N),). The projection is rounded before it is rotated, as if it were an operation of
    its own, so that pages hold what a prompt's step would have written.
    """
    start_next(EARLY)
    D2: tl.constexpr = D // 2
    HEADS: tl.constexpr = H + 2 * KV
    lane = tl.arange(0, BLOCK_N)
    wide_pair = tl.program_id(0) * (BLOCK_N // 2) + lane // 2
    feature = wide_pair // D2 * D + lane % 2 * D2 + wide_pair % D2
    is_feature = wide_pair < HEADS * D2
    row = tl.arange(0, BLOCK_M)
    result = product(
        weight, feature, is_feature, x, x_stride, rows, norm, eps,
        K, BLOCK_M, BLOCK_N, BLOCK_K, TENSOR_CORES, NORM, EARLY,
    )  # fmt: skip
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    result = result.to(query.dtype.element_ty).to(tl.float32)
    first, second = tl.split(tl.reshape(result, [BLOCK_M, BLOCK_N // 2, 2]))

    pair = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    head, dim = pair // D2, pair % D2
    is_row = row < rows
    rotates = is_row[:, None] & (head < H + KV)[None, :]
    angle = row[:, None] * D2 + dim[None, :]
    cos = tl.load(cosine + angle, mask=rotates, other=1.0)
    sin = tl.load(sine + angle, mask=rotates, other=0.0)
    turned = tl.where(rotates, first * cos - second * sin, first).to(query.dtype.element_ty)
    turned_second = tl.where(rotates, second * cos + first * sin, second).to(query.dtype.element_ty)

    is_query = is_row[:, None] & (head < H)[None, :]
    queries = query + row[:, None] * (H * D) + (head * D + dim)[None, :]
    tl.store(queries, turned, mask=is_query)
    tl.store(queries + D2, turned_second, mask=is_query)
    slot = tl.load(slot_mapping + row, mask=is_row, other=0)
    block, offset = (slot // BLOCK_SIZE).to(tl.int64)[:, None], (slot % BLOCK_SIZE).to(tl.int64)[:, None]
    is_key = is_row[:, None] & ((head >= H) & (head < H + KV))[None, :]
    at = block * keys_block_stride + offset + ((head - H) * keys_head_stride + dim * BLOCK_SIZE)[None, :]
    tl.store(keys + at, turned, mask=is_key)
    tl.store(keys + at + D2 * BLOCK_SIZE, turned_second, mask=is_key)
    is_value = is_row[:, None] & ((head >= H + KV) & (head < HEADS))[None, :]
    at = block * values_block_stride + offset * D + ((head - H - KV) * values_head_stride + dim)[None, :]
    tl.store(values + at, turned, mask=is_value)
    tl.store(values + at + D2, turned_second, mask=is_value)


class Slots(NamedTuple):
    """Where a step's keys and values go, and how queries and keys are turned: arguments of `ops.rotate_and_write`."""

    keys: Tensor
    values: Tensor
    slot_mapping: Tensor
    cosine: Tensor
    sine: Tensor

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the blocks and heads of the pages."""
        return (*self.keys.stride()[:2], *self.values.stride()[:2])


def launch_options(config: FewRowsConfig, early: bool) -> dict[str, int | bool]:
    """What the launcher, not the kernel, is told."""
    options: dict[str, int | bool] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return options | {"launch_pdl": True} if early else options


def _blocks(x: Tensor, config: FewRowsConfig, has_norm: bool, early: bool) -> dict[str, int | bool | str]:
    on_tensor_cores = config.splits > 0
    norm = "none"
    if has_norm:
        norm = "before" if on_tensor_cores and x.dtype is torch.float16 else "after"
    rows = triton.next_power_of_2(x.shape[0])
    return {
        "BLOCK_M": max(rows, 16) if on_tensor_cores else rows,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "TENSOR_CORES": on_tensor_cores,
        "NORM": norm,
        "EARLY": early,
    }


def split_evenly(columns: int, config: FewRowsConfig) -> tuple[int, int]:
    """(tiles of each split, splits): no more splits than have a tile."""
    tiles = triton.cdiv(columns, config.block_k)
    tiles_per_split = triton.cdiv(tiles, max(config.splits, 1))
    return tiles_per_split, triton.cdiv(tiles, tiles_per_split) if config.splits else 1


def add_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None,
    config: FewRowsConfig,
    early: bool = False,
    arrivals: Tensor | None = None,
) -> Tensor:
    """`norm(x) @ weight.T + bias + residual`, rounded once.

    x: [T, K] and residual: [T, N], contiguous in their rows; weight: [N, K], contiguous; bias: [N]. A norm only without
    splits. arrivals: zeros, int32, at least one for each block of features, if the columns are split.
    """
    (rows, columns), features = x.shape, weight.shape[0]
    output = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    tiles_per_split, splits = split_evenly(columns, config)
    assert norm is None or splits == 1
    grid = triton.cdiv(features, config.block_n)
    partial = output
    if splits > 1:
        partial = torch.empty((splits, rows, features), dtype=torch.float32, device=x.device)
        if arrivals is None:
            arrivals = torch.zeros(grid, dtype=torch.int32, device=x.device)
    add_kernel[(grid, splits)](
        output,
        partial,
        output if arrivals is None else arrivals,
        x,
        weight,
        weight if bias is None else bias,
        x if residual is None else residual,
        weight if norm is None else norm.weight,
        rows,
        features,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        0.0 if norm is None else norm.eps,
        tiles_per_split,
        K=columns,
        SPLITS=splits,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        **_blocks(x, config, norm is not None, early),
        **launch_options(config, early),
    )
    return output


def gate_product(
    x: Tensor, weight: Tensor, norm: Norm, config: FewRowsConfig, early: bool = False, arrivals: Tensor | None = None
) -> Tensor:
    """`silu(gate) * up` where gate and up, side by side, are `norm(x) @ weight.T`; rounded once. [T, F].

    x: [T, K], contiguous in its rows; weight: [2 F, K], contiguous. `arrivals`, a power of two of int32, become zeros.
    """
    (rows, columns), intermediate = x.shape, weight.shape[0] // 2
    output = torch.empty((rows, intermediate), dtype=x.dtype, device=x.device)
    gate_kernel[(triton.cdiv(intermediate, config.block_n // 2),)](
        output,
        output if arrivals is None else arrivals,
        x,
        weight,
        norm.weight,
        rows,
        intermediate,
        x.stride(0),
        norm.eps,
        K=columns,
        ARRIVALS=0 if arrivals is None else len(arrivals),
        **_blocks(x, config, True, early),
        **launch_options(config, early),
    )
    return output


def rotate_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    slots: Slots,
    heads: int,
    config: FewRowsConfig,
    early: bool = False,
) -> Tensor:
    """Queries [T, H, D] of `norm(x) @ weight.T + bias`, rotated; keys and values go to their slots.

    x: [T, K], contiguous in its rows; weight: [(H + 2 KV) * D, K], contiguous.
    """
    rows, columns = x.shape
    _, kv_heads, head_dim, block_size = slots.keys.shape
    query = torch.empty((rows, heads, head_dim), dtype=x.dtype, device=x.device)
    rotate_kernel[(triton.cdiv(weight.shape[0], config.block_n),)](
        query,
        slots.keys,
        slots.values,
        slots.slot_mapping,
        slots.cosine,
        slots.sine,
        x,
        weight,
        weight if bias is None else bias,
        norm.weight,
        rows,
        x.stride(0),
        norm.eps,
        *slots.strides,
        K=columns,
        H=heads,
        KV=kv_heads,
        D=head_dim,
        BLOCK_SIZE=block_size,
        HAS_BIAS=bias is not None,
        **_blocks(x, config, True, early),
        **launch_options(config, early),
    )
    return query
