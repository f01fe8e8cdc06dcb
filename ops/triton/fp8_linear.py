"""Linear layers in e4m3: rows of x are rounded with a scale each, and multiply a weight with a scale for each row.

One kernel norms and rounds the rows, in the same way for all numbers of tokens. For few tokens a GEMM here then takes
the time of reading the weight: its rows are the left operand of the tensor cores, which they fill and those of x do
not, and its columns are split where its rows make too few programs. For many tokens the GEMM is torch's.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.norm import Norm
from dispec.ops.triton.gemm_tuning import SkinnyGemmConfig, choose_fp8_linear
from dispec.ops.triton.linear_residual import MAX_COUNTERS, split_counters
from dispec.ops.triton.norm_activation import silu_and_mul
from dispec.ops.triton.overlap import launch_next, overlap_options, prefetch, wait
from dispec.ops.triton.skinny_gemm import split_evenly
from dispec.ops.triton.tuning import describe

MAX_TOKENS = 64  # of a program of the GEMM
ELEMENTS_PER_WARP = 1024  # of a row that is rounded
# Bytes of each of its weight's rows that a program of the GEMM asks for while the codes are still being computed. On an
# H100 a layer of Qwen2.5-7B for one token takes 9.3 instead of 10.8 us (QKV) and 27.9 instead of 29.5 us (down).
PREFETCHED_BYTES = 512


@triton.jit
@no_type_check
def round_rows_kernel(
    codes,
    scales,
    x,
    norm,
    x_stride,
    eps,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Round one row of `norm(x)` [T, K] to e4m3. Grid (T,)."""
    launch_next(OVERLAPS)
    wait(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    kind = x.dtype.element_ty
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        wide = (wide * tl.math.rsqrt(tl.sum(wide * wide, 0) / K + eps)).to(kind).to(tl.float32)
        wide = (wide * tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(wide), 0), 2.0**-100)  # whose inverse is finite
    tl.store(codes + row * K + column, (wide * tl.math.div_rn(448.0, largest)).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, tl.math.div_rn(largest, 448.0))


@triton.jit(do_not_specialize=["num_tokens"])
@no_type_check
def fp8_gemm_kernel(
    output,
    partial,
    counters,
    codes,
    row_scales,
    weight,
    weight_scales,
    bias,
    residual,
    num_tokens,
    N,
    tiles_per_split,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    PREFETCHED: tl.constexpr,
):
    """Write `codes @ weight.T` times the scales, plus the bias, gated, plus the residual: BLOCK_N rows of the weight.

    Grid (ceil(N / BLOCK_N), SPLITS, ceil(T / BLOCK_M)). codes: [T, K] and weight: [N, K], e4m3. Splits are summed as in
    `linear_residual_kernel`. With IS_GATED rows of the gate and of the up half of the weight alternate in a tile. With
    OVERLAPS a program first asks for PREFETCHED bytes of its weight's rows, while the codes are still being computed.
    """
    lane = tl.arange(0, BLOCK_N)
    if IS_GATED:
        width = N // 2  # features of a row of the output
        pair = tl.program_id(0) * (BLOCK_N // 2) + lane // 2
        feature = lane % 2 * width + pair
        is_feature = pair < width
    else:
        width = N
        feature = tl.program_id(0) * BLOCK_N + lane
        is_feature = feature < N
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = row < num_tokens
    column = tl.arange(0, BLOCK_K)
    weights = weight + feature[:, None].to(tl.int64) * K + column[None, :]
    inputs = codes + row[:, None].to(tl.int64) * K + column[None, :]
    tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    # The tensor cores add e4m3 products with fewer bits than float32 has; sums of 128 are added in float32.
    exact: tl.constexpr = min(BLOCK_K, 128)
    first = tl.program_id(1) * tiles_per_split
    if OVERLAPS:
        line = weight + feature.to(tl.int64) * K + first * BLOCK_K
        for index in tl.static_range(PREFETCHED // 128):
            inside = is_feature & (first * BLOCK_K + 128 * index < K)
            prefetch(line + 128 * index, inside, weight)
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for tile in range(first, tl.minimum(first + tiles_per_split, tiles)):
        at = tile * BLOCK_K
        of_weight, of_input = is_feature[:, None], is_token[:, None]
        if K % BLOCK_K != 0:
            of_weight &= at + column[None, :] < K
            of_input &= at + column[None, :] < K
        # Each weight is read once, so it may leave the cache first.
        left = tl.load(weights + at, mask=of_weight, other=0.0, eviction_policy="evict_first")
        right = tl.load(inputs + at, mask=of_input, other=0.0)
        total = tl.dot(left, tl.trans(right), total, max_num_imprecise_acc=exact)
    result = tl.trans(total)
    if SPLITS > 1:
        to = partial + row[:, None] * N + feature[None, :]
        mask = is_token[:, None] & is_feature[None, :]
        size = num_tokens * N
        tl.store(to + tl.program_id(1) * size, result, mask=mask)
        tl.debug_barrier()  # all threads store their part before one of them counts it
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") != SPLITS - 1:
            return
        tl.store(counter, 0)
        result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for index in tl.static_range(SPLITS):
            result += tl.load(to + index * size, mask=mask, other=0.0, cache_modifier=".cg")
    result *= tl.load(weight_scales + feature, mask=is_feature, other=0.0)[None, :]
    result *= tl.load(row_scales + row, mask=is_token, other=0.0)[:, None]
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    if IS_GATED:
        gate, up = tl.split(tl.reshape(result, [BLOCK_M, BLOCK_N // 2, 2]))
        result = gate / (1.0 + tl.exp(-gate)) * up
        feature = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    at = row[:, None].to(tl.int64) * width + feature[None, :]
    mask = is_token[:, None] & (feature[None, :] < width)
    if ADDS:
        result += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=mask)


def round_rows(x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Return `norm(x)` rounded to e4m3 [T, K], and the scales of its rows [T] in float32.

    x: [T, K], contiguous in its rows, in bfloat16. A row's scale is its largest magnitude over 448.
    """
    num_tokens, in_features = x.shape
    codes = torch.empty((num_tokens, in_features), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(in_features)
    round_rows_kernel[(num_tokens,)](
        codes,
        scales,
        x,
        x if norm is None else norm.weight,
        x.stride(0),
        0.0 if norm is None else norm.eps,
        K=in_features,
        HAS_NORM=norm is not None,
        BLOCK=block,
        num_warps=min(max(block // ELEMENTS_PER_WARP, 1), 16),
        **overlap_options(x),
    )
    return codes, scales


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    is_gated: bool,
    config: SkinnyGemmConfig | None = None,
) -> Tensor:
    """Compute `ops.linear` for a weight in e4m3 [N, K] with scales [N, 1] in float32.

    x: [T, K] in bfloat16, rounded as in `round_rows`. Returns [T, M], contiguous. Launches with several splits share
    their counters and must not run concurrently. config: replaces the table's choice in tests and tuning.
    """
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    if num_tokens == 0:
        return x.new_empty(0, out_features // 2 if is_gated else out_features)
    x = x if x.stride(1) == 1 else x.contiguous()
    if config is None:
        config = choose_fp8_linear(describe(x.device), num_tokens, out_features, in_features)
    codes, row_scales = round_rows(x, norm)
    if config is not None:
        return fp8_gemm(codes, row_scales, weight, scales, bias, residual, is_gated, config)
    y = scaled_mm(codes, row_scales, weight, scales, bias)
    if is_gated:
        y = silu_and_mul(y)
    return y if residual is None else y.add_(residual)


def scaled_mm(
    codes: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    use_fast_accum: bool = False,
) -> Tensor:
    """Return `(row_scales * codes) @ (scales * weight).T + bias` by torch, which needs N and K that 16 divides."""
    return torch._scaled_mm(
        codes,
        weight.T,
        scale_a=row_scales[:, None],
        scale_b=scales.view(1, -1),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=use_fast_accum,
    )


def fp8_gemm(
    codes: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    is_gated: bool,
    config: SkinnyGemmConfig,
) -> Tensor:
    """Return the product of e4m3 codes [T, K] and a weight [N, K] times their scales, around it as in `fp8_linear`."""
    (num_tokens, in_features), out_features = codes.shape, weight.shape[0]
    width = out_features // 2 if is_gated else out_features
    output = torch.empty((num_tokens, width), dtype=torch.bfloat16, device=codes.device)
    block_m = min(max(triton.next_power_of_2(num_tokens), 16), MAX_TOKENS)
    tiles_per_split, splits = split_evenly(in_features, config)
    grid = (triton.cdiv(2 * width if is_gated else width, config.block_n), splits, triton.cdiv(num_tokens, block_m))
    partial = output
    if splits > 1:
        partial = torch.empty((splits, num_tokens, out_features), dtype=torch.float32, device=codes.device)
        assert grid[0] * grid[2] <= MAX_COUNTERS
    fp8_gemm_kernel[grid](
        output,
        partial,
        split_counters(codes.device) if splits > 1 else scales,
        codes,
        row_scales,
        weight,
        scales,
        output if bias is None else bias,
        output if residual is None else residual.contiguous(),
        num_tokens,
        out_features,
        tiles_per_split,
        K=in_features,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLITS=splits,
        IS_GATED=is_gated,
        HAS_BIAS=bias is not None,
        ADDS=residual is not None,
        PREFETCHED=PREFETCHED_BYTES,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **overlap_options(codes),
    )
    return output
