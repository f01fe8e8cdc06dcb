"""GEMMs with int4 and int8 weights in 16 bits: few tokens take as long as reading the weight.

The tensor cores multiply the codes of `ops.triton.quantized_layout` themselves, exact in 16 bits. The weight is
the left operand, because its rows fill a tile and those of `x` may not. The scale of a group multiplies its sums in
float32. Where the weight's rows make too few programs, the columns are split as well; the last program of a tile sums
the parts in a fixed order.
"""

import os
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispec.ops.norm import Norm
from dispec.ops.triton.gemm_tuning import QuantizedGemmConfig, choose_quantized_linear
from dispec.ops.triton.linear_residual import MAX_COUNTERS, split_counters
from dispec.ops.triton.norm_activation import rms_norm, silu_and_mul
from dispec.ops.triton.quantized_layout import CODES, ROWS
from dispec.ops.triton.tuning import describe

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_FUSED_NORM_COLUMNS = 2048  # for each warp, whose registers hold the token until the weight is read
DEQUANTIZED_BYTES = 192 * 2**20  # at a time, for torch's GEMM: smaller parts were up to 8% slower


@triton.jit
@no_type_check
def _unpack(words, INDEX: tl.constexpr, CODES: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return code INDEX of each word as DTYPE.

    A code in the low bits of a number's mantissa is 128 (bfloat16) or 1024 (float16) plus the code, and subtracting
    that is exact: 3 instructions for the two codes of a register. ASSEMBLY: False in the interpreter, which has none.
    """
    SHIFT: tl.constexpr = INDEX * (16 // CODES)
    if not ASSEMBLY:
        HALF: tl.constexpr = 8 if CODES == 4 else 128
        # The sign of an int8 code is turned over, so that both kinds are a code plus HALF.
        codes = ((((words >> SHIFT) & (2 * HALF - 1)) ^ (0 if CODES == 4 else HALF)) - HALF).to(tl.float32).to(DTYPE)
    elif CODES == 4 and DTYPE.is_bf16():
        codes = tl.inline_asm_elementwise(
            f"""{{ .reg .b32 t, one, base; mov.b32 one, 0x3F803F80; mov.b32 base, 0xC308C308; shr.u32 t, $1, {SHIFT};
            lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $0, t, one, base; }}""",
            "=r,r", [words], tl.bfloat16, True, 2,
        )  # fmt: skip
    elif CODES == 4:
        codes = tl.inline_asm_elementwise(
            f"""{{ .reg .b32 t, base; mov.b32 base, 0x64086408; shr.u32 t, $1, {SHIFT};
            lop3.b32 t, t, 0x000F000F, 0x64006400, 0xEA; sub.rn.f16x2 $0, t, base; }}""",
            "=r,r", [words], tl.float16, True, 2,
        )  # fmt: skip
    elif DTYPE.is_bf16():  # the sign bit of the code turns 128 into 256, of which minus 128 remains
        codes = tl.inline_asm_elementwise(
            f"""{{ .reg .b32 t, u, minus; mov.b32 minus, 0xBF80BF80; shr.u32 t, $1, {SHIFT};
            lop3.b32 u, t, 0x00800080, 0x43004300, 0xEA; lop3.b32 t, t, 0x007F007F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, u, minus, t; }}""",
            "=r,r", [words], tl.bfloat16, True, 2,
        )  # fmt: skip
    else:
        codes = tl.inline_asm_elementwise(
            f"""{{ .reg .b32 t, base; mov.b32 base, 0x64806480; shr.u32 t, $1, {SHIFT};
            lop3.b32 t, t, 0x00FF00FF, 0x64806480, 0x6A; sub.rn.f16x2 $0, t, base; }}""",
            "=r,r", [words], tl.float16, True, 2,
        )  # fmt: skip
    return codes


@triton.jit
@no_type_check
def _load_scales(
    pointers, block, groups, stride, SCALES: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, CODES: tl.constexpr
):
    """Return the scales or offsets of a block, SCALES tensors. Past the last group: those of the last."""
    loaded = ()
    for index in tl.static_range(SCALES):
        column = block * (CODES * WORDS) + index * WORDS
        loaded += (tl.load(pointers + tl.minimum(column // GROUP, groups - 1) * stride),)
    return loaded


@triton.jit(do_not_specialize=["num_tokens", "K", "blocks", "blocks_per_split", "groups"])
@no_type_check
def quantized_linear_kernel(
    output,
    partial,
    counters,
    x,
    words,
    scales,
    offsets,
    bias,
    residual,
    norm,
    eps,
    num_tokens,
    N,
    K,
    x_stride,
    scale_stride,
    blocks,
    blocks_per_split,
    groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    CODES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    IS_ROW: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    NORM_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Compute BLOCK_N features of BLOCK_M tokens over one split of the columns.

    Grid (ceil(T / BLOCK_M), ceil(N / BLOCK_N), SPLITS). With several splits `partial` holds
    [SPLITS, BLOCK_N, BLOCK_M] in float32 for each tile; `counters` is zero before and after.

    SCALES: 1 for a block of columns, or one for the columns of each code of its words. IS_ROW: a row of the weight is
    one group. NORM_BLOCK: 0, or a power of two from K to norm x, one token: the norm's weight multiplies x as it is
    loaded, the divisor multiplies the sums. GATED: the first half of a tile are rows of the gate, the second the same
    rows of the up half, and BLOCK_N / 2 features come out.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    lane = tl.arange(0, BLOCK_N)
    if GATED:
        pair = tl.program_id(1) * (BLOCK_N // 2) + lane % (BLOCK_N // 2)
        feature = tl.where(pair < N // 2, pair + lane // (BLOCK_N // 2) * (N // 2), 0)
    else:
        feature = tl.program_id(1) * BLOCK_N + lane
        feature = tl.where(feature < N, feature, 0)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = row < num_tokens
    word = tl.arange(0, WORDS)
    first = tl.program_id(2) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, blocks)
    at_row = (feature // 16).to(tl.int64) * blocks * (16 * WORDS) + feature % 16 * WORDS
    tiles = words + at_row[:, None] + word[None, :]
    inputs = x + row[:, None].to(tl.int64) * x_stride + word[None, :]
    gains = norm + row[:, None] * 0 + word[None, :]
    scales += feature
    offsets += feature
    if NORM_BLOCK:  # the divisor of the only token; loaded ahead of the weight, summed after it
        every = tl.arange(0, NORM_BLOCK)
        token = tl.load(x + every, mask=every < K, other=0.0)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    ones = tl.full([BLOCK_N, WORDS], 1.0, DTYPE)
    # The scales of the next block are loaded one iteration ahead.
    scale = _load_scales(scales, first, groups, scale_stride, SCALES, GROUP, WORDS, CODES)
    offset = scale
    if HAS_OFFSETS:
        offset = _load_scales(offsets, first, groups, scale_stride, SCALES, GROUP, WORDS, CODES)
    for block in range(first, last):
        # Each weight is read once, so it may leave the cache first.
        tile = tl.load(tiles + block * (16 * WORDS), eviction_policy="evict_first")
        following, following_offset = scale, offset
        if not IS_ROW:
            following = _load_scales(scales, block + 1, groups, scale_stride, SCALES, GROUP, WORDS, CODES)
            if HAS_OFFSETS:
                following_offset = _load_scales(offsets, block + 1, groups, scale_stride, SCALES, GROUP, WORDS, CODES)
        for index in tl.static_range(CODES):
            if IS_ROW:
                part, part_sums = total, sums
            elif index * SCALES % CODES == 0:
                part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                part_sums = part
            column = (block * CODES + index) * WORDS
            inside = is_token[:, None]
            if not EVEN_K:
                inside &= column + word[None, :] < K
            right = tl.load(inputs + column, mask=inside, other=0.0)
            if NORM_BLOCK:  # as a tile, because the pipeline copies no vector of 16 bits
                gain = tl.load(gains + column, mask=inside, other=0.0)
                if ASSEMBLY:
                    right *= gain
                else:  # the interpreter would multiply the bits of bfloat16
                    right = (right.to(tl.float32) * gain.to(tl.float32)).to(DTYPE)
            right = tl.trans(right)
            part = tl.dot(_unpack(tile, index, CODES, DTYPE, ASSEMBLY), right, part)
            if HAS_OFFSETS:
                part_sums = tl.dot(ones, right, part_sums)
            if IS_ROW:
                total, sums = part, part_sums
            elif (index + 1) * SCALES % CODES == 0:
                total += part * scale[index * SCALES // CODES].to(tl.float32)[:, None]
                if HAS_OFFSETS:
                    total += part_sums * offset[index * SCALES // CODES].to(tl.float32)[:, None]
        scale, offset = following, following_offset
    if IS_ROW:
        total *= scale[0].to(tl.float32)[:, None]
        if HAS_OFFSETS:
            total += sums * offset[0].to(tl.float32)[:, None]
    if SPLITS > 1:
        # Parts are stored as the tiles that they are, which needs no mask and writes whole sectors.
        tile_index = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        inner = lane[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        parts = partial + tile_index.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M) + inner
        tl.store(parts + tl.program_id(2) * (BLOCK_N * BLOCK_M), total)
        tl.debug_barrier()  # all threads store their part before one of them counts it
        if tl.atomic_add(counters + tile_index, 1, sem="acq_rel") != SPLITS - 1:
            return
        tl.store(counters + tile_index, 0)
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(parts + split * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
    result = tl.trans(total)
    if NORM_BLOCK:
        token = token.to(tl.float32)
        result *= tl.math.rsqrt(tl.sum(token * token, 0) / K + eps)
    if HAS_BIAS:
        result += tl.load(bias + feature).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.trans(tl.reshape(result, [BLOCK_M, 2, BLOCK_N // 2]), 0, 2, 1))
        result = gate / (1.0 + tl.exp(-gate)) * up
        made = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        M = N // 2
    else:
        made = tl.program_id(1) * BLOCK_N + lane
        M = N
    at = row[:, None].to(tl.int64) * M + made[None, :]
    mask = is_token[:, None] & (made[None, :] < M)
    if ADDS:
        result += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def dequantize_kernel(
    output,
    words,
    scales,
    offsets,
    first_row,
    K,
    scale_stride,
    blocks,
    group_size,
    WORDS: tl.constexpr,
    CODES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
):
    """Write one block of 16 rows of the weight to `output` [rows, K], whose first row is `first_row`.

    Grid (rows / 16, blocks).
    """
    DTYPE: tl.constexpr = output.dtype.element_ty
    lane = tl.arange(0, 16)
    word = tl.arange(0, WORDS)
    start = first_row // 16 + tl.program_id(0)
    block = tl.program_id(1)
    tiles = words + (start.to(tl.int64) * blocks + block) * (16 * WORDS) + lane[:, None] * WORDS + word[None, :]
    tile = tl.load(tiles)
    rows = output + (tl.program_id(0) * 16 + lane[:, None]).to(tl.int64) * K
    for index in tl.static_range(CODES):
        column = (block * CODES + index) * WORDS
        at = tl.minimum(column, K - 1) // group_size * scale_stride + start * 16 + lane
        value = _unpack(tile, index, CODES, DTYPE, ASSEMBLY).to(tl.float32)
        value *= tl.load(scales + at).to(tl.float32)[:, None]
        if HAS_OFFSETS:
            value += tl.load(offsets + at).to(tl.float32)[:, None]
        tl.store(rows + column + word[None, :], value.to(DTYPE), mask=column + word[None, :] < K)


def quantized_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    out_features: int,
    kind: str,
    group_size: int,
    bias: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    is_gated: bool,
    config: QuantizedGemmConfig | None = None,
) -> Tensor:
    """Compute `ops.linear` for a packed weight. config: replaces the table's choice in tests and tuning.

    For many tokens the weight is dequantised, rounded to the type of x, and torch multiplies.
    """
    num_tokens, in_features = x.shape
    features = out_features // 2 if is_gated else out_features
    if num_tokens == 0:
        return x.new_empty(0, features)
    x = x if x.stride(1) == 1 else x.contiguous()
    if config is None:
        config = choose_quantized_linear(describe(x.device), num_tokens, out_features, in_features, kind)
    # float16 overflows on x times a norm weight without the divisor.
    fuses = num_tokens == 1 and x.dtype is torch.bfloat16 and config.block_n > 0
    fuses = fuses and in_features <= MAX_FUSED_NORM_COLUMNS * config.num_warps
    if norm is not None and not fuses:
        x, norm = rms_norm(x, norm), None
    if config.block_n == 0:
        y = _multiply_dequantized(x, words, scales, offsets, out_features, kind, group_size)
        y = y if bias is None else y.add_(bias)
        y = silu_and_mul(y) if is_gated else y
        return y if residual is None else y.add_(residual)
    size, per_word = words.shape[3], CODES[kind]
    blocks = words.shape[1]
    blocks_per_split = triton.cdiv(blocks, config.splits)
    splits = triton.cdiv(blocks, blocks_per_split)
    block_m = min(max(triton.next_power_of_2(num_tokens), config.min_block_m), config.block_m)
    grid = (triton.cdiv(num_tokens, block_m), triton.cdiv(features, config.block_n // (2 if is_gated else 1)), splits)
    output = torch.empty((num_tokens, features), dtype=x.dtype, device=x.device)
    partial = output
    if splits > 1:
        assert grid[0] * grid[1] <= MAX_COUNTERS
        partial = torch.empty(
            (grid[0] * grid[1] * splits, config.block_n, block_m), dtype=torch.float32, device=x.device
        )
    is_row = group_size >= in_features
    quantized_linear_kernel[grid](
        output,
        partial,
        split_counters(x.device) if splits > 1 else output,
        x,
        words,
        scales,
        scales if offsets is None else offsets,
        scales if bias is None else bias,
        output if residual is None else residual,
        scales if norm is None else norm.weight,
        0.0 if norm is None else norm.eps,
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        scales.shape[1],
        blocks,
        blocks_per_split,
        scales.shape[0],
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        WORDS=size,
        CODES=per_word,
        ASSEMBLY=not INTERPRETED,
        SCALES=1 if is_row or group_size % (size * per_word) == 0 else per_word,
        GROUP=1 if is_row else group_size,
        IS_ROW=is_row,
        HAS_OFFSETS=offsets is not None,
        NORM_BLOCK=0 if norm is None else triton.next_power_of_2(in_features),
        HAS_BIAS=bias is not None,
        ADDS=residual is not None,
        GATED=is_gated,
        EVEN_K=in_features % (size * per_word) == 0,
        SPLITS=splits,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return output


def _multiply_dequantized(
    x: Tensor, words: Tensor, scales: Tensor, offsets: Tensor | None, out_features: int, kind: str, group_size: int
) -> Tensor:
    (num_tokens, in_features), blocks = x.shape, words.shape[1]
    output = torch.empty((num_tokens, out_features), dtype=x.dtype, device=x.device)
    parts = triton.cdiv(out_features * in_features * x.dtype.itemsize, DEQUANTIZED_BYTES)
    step = triton.cdiv(triton.cdiv(out_features, parts), 128) * 128
    rows = triton.cdiv(min(step, out_features), ROWS) * ROWS
    dequantized = torch.empty((rows, in_features), dtype=x.dtype, device=x.device)
    for first in range(0, out_features, step):
        count = min(step, out_features - first)
        dequantize_kernel[(triton.cdiv(count, ROWS), blocks)](
            dequantized,
            words,
            scales,
            scales if offsets is None else offsets,
            first,
            in_features,
            scales.shape[1],
            blocks,
            group_size,
            WORDS=words.shape[3],
            CODES=CODES[kind],
            ASSEMBLY=not INTERPRETED,
            HAS_OFFSETS=offsets is not None,
            num_warps=1,
        )
        torch.mm(x, dequantized[:count].T, out=output[:, first : first + count])
    return output
