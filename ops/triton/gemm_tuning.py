"""Launch configurations of GEMMs, by device architecture and shape.

None stands for torch's GEMM. `python -m dispec.bench.layer --sweep` and `python -m dispec.bench.skinny_gemm --sweep`
measure others; `tests/test_triton_aot.py` shows whether they spill.
"""

from typing import NamedTuple

from dispec.ops.triton.tuning import Device


class SkinnyGemmConfig(NamedTuple):
    """How to launch a skinny GEMM.

    block_n: output features of a program. block_k: columns of a tile. splits: programs that share the columns; 0
    selects the kernel without tensor cores, which has no `num_stages`. fuses_norm: whether the kernel norms its input;
    else a kernel before it does.
    """

    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int = 1
    fuses_norm: bool = False


class GatedGemmConfig(NamedTuple):
    """How to launch a GEMM of many tokens with its gated activation.

    block_m: tokens, block_n: features of the output, block_k: columns of a tile. group_m: tiles of tokens that share
    the weight in the L2 cache. programs: most programs.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    programs: int
    num_warps: int
    num_stages: int


class QuantizedGemmConfig(NamedTuple):
    """How to launch a GEMM with int4 or int8 weights.

    block_n: output features of a program; 0 selects torch's GEMM with a dequantised weight. splits: programs that share
    the columns. block_m, min_block_m: most and fewest tokens of a tile.
    """

    block_n: int
    splits: int
    num_warps: int
    num_stages: int
    block_m: int = 64
    min_block_m: int = 8


# Bytes of each of its weight's rows that a program of a GEMM asks for before the kernel before it has completed.
PREFETCHED_BYTES = 256

# Fewest tokens of a GEMM with a gated activation that is not torch's, where `choose_fused_linear` has no kernel.
MIN_GATED_GEMM_TOKENS = 2048

# Elements of the output that one program sums the splits of, in split-K GEMMs.
REDUCE_BLOCK = 256


def choose_linear(device: Device, num_tokens: int, out_features: int, in_features: int) -> SkinnyGemmConfig | None:
    """Return how to launch a GEMM without a norm, gate or residual; None where torch's was no slower.

    Measured with `python -m dispec.bench.skinny_gemm --sweep` on an H100, over the weights of three models.
    """
    if device.architecture != "sm_90" or in_features % 16:
        return None
    tiles = out_features // 64
    if tiles >= 3 * device.multiprocessors and num_tokens <= 64:
        return SkinnyGemmConfig(128, 128, 1, 4, 4)
    if num_tokens > 32:
        return None
    if tiles >= device.multiprocessors:
        return SkinnyGemmConfig(64, 128, 1, 4, 3)
    if in_features > 4096:  # more programs read the weight, which is worth a second kernel
        return SkinnyGemmConfig(64, 128, device.multiprocessors // max(tiles, 1), 4, 5)
    if num_tokens <= 2 and in_features < 4096:
        return SkinnyGemmConfig(2, 512, 0, 2)
    if num_tokens <= 8 or (in_features == 4096 and num_tokens <= 16):
        return SkinnyGemmConfig(64, 128, 1, 4, 5)
    return None


def choose_fused_linear(
    device: Device,
    num_tokens: int,
    out_features: int,
    in_features: int,
    *,
    has_norm: bool = False,
    is_gated: bool = False,
) -> SkinnyGemmConfig | None:
    """Return how to launch a layer's GEMM in one kernel with its norm, gate or residual; None where torch's was faster.

    has_norm: its input is normed. is_gated: half of its output features gate the others.
    """
    if device.architecture == "fallback" or out_features % 16 or in_features % 16:
        return None
    if not is_gated and out_features // 64 >= 3 * device.multiprocessors:
        return None  # the head, for which `choose_linear` has configurations
    choose = _choose_on_hopper if device.architecture == "sm_90" else _choose_on_ampere
    return choose(device, num_tokens, out_features, in_features, has_norm, is_gated)


def _column_splits(device: Device, out_features: int) -> int:
    """Return the splits of the columns that make about one program, of 64 features, for each multiprocessor."""
    return min(max(device.multiprocessors * 64 // out_features, 1), 12)


def _choose_on_hopper(
    device: Device, num_tokens: int, out_features: int, in_features: int, has_norm: bool, is_gated: bool
) -> SkinnyGemmConfig | None:
    """Choose for kernels that overlap.

    From whole layers of Qwen2.5-1.5B and 7B on an H200. A norm in a kernel of its own then costs less than in the GEMM.
    """
    if num_tokens > 64:
        return None
    is_long = in_features > 2 * out_features  # the down projection: its output features alone make too few programs
    splits = _column_splits(device, out_features)
    if is_gated:
        return SkinnyGemmConfig(64, 128, 1, 4, 3) if num_tokens <= 32 else SkinnyGemmConfig(64, 64, 1, 4, 4)
    if is_long:
        return SkinnyGemmConfig(64, 128, splits, 4, 6 if splits <= 2 else 5 if num_tokens <= 32 else 4)
    if num_tokens <= 2:
        if has_norm:
            return SkinnyGemmConfig(4, 512, 0, 2, fuses_norm=True)
        return SkinnyGemmConfig(2, 512, 0, 2) if in_features < 3072 else SkinnyGemmConfig(4, 512, 0, 4)
    if num_tokens > (16 if has_norm or in_features < 3072 else 32):
        return None
    if has_norm and (splits == 1 or in_features < 1536):
        return SkinnyGemmConfig(16, 128, 1, 2, 5, fuses_norm=True)
    if has_norm:
        return SkinnyGemmConfig(64, 128, splits, 4, 3)
    if in_features < 1536:
        return SkinnyGemmConfig(16, 512, 1, 4, 3)
    splits = min(splits, in_features // 512)
    return SkinnyGemmConfig(64, 128, splits, 4, 4 if splits > 2 else 6)


def _choose_on_ampere(
    device: Device, num_tokens: int, out_features: int, in_features: int, has_norm: bool, is_gated: bool
) -> SkinnyGemmConfig | None:
    """Choose for kernels that follow one another; from `python -m dispec.bench.layer --sweep` with Qwen2.5-1.5B."""
    is_long = in_features > 2 * out_features
    if num_tokens <= 2:
        if has_norm or is_gated:
            return SkinnyGemmConfig(4, 512, 0, 2, fuses_norm=True)
        return SkinnyGemmConfig(2, 1024, 0, 4) if is_long else SkinnyGemmConfig(2, 512, 0, 2)
    if is_gated:
        return SkinnyGemmConfig(64, 128, 1, 4, 3, fuses_norm=num_tokens <= 16) if num_tokens <= 32 else None
    if num_tokens > 16:
        return None
    if has_norm:
        return SkinnyGemmConfig(16, 128, 1, 2, 5, fuses_norm=True)
    if is_long:
        return SkinnyGemmConfig(64, 128, _column_splits(device, out_features), 4, 5)
    return SkinnyGemmConfig(16, 512, 1, 4, 3)


def choose_gated_gemm(device: Device, num_tokens: int, out_features: int, in_features: int) -> GatedGemmConfig | None:
    """Return how to launch a gated GEMM of many tokens; None where torch's and the activation after it are faster.

    On an H200 with the shapes of Qwen2.5-1.5B: 176 us for 2,048 tokens, torch's GEMM 172 and the activation 19; 694 us
    for 8,192 tokens, 660 and 92.
    """
    if device.architecture != "sm_90" or num_tokens < MIN_GATED_GEMM_TOKENS or out_features % 16 or in_features % 8:
        return None
    return GatedGemmConfig(128, 128, 64, 8, device.multiprocessors, 8, 4)


def choose_fp8_linear(device: Device, num_tokens: int, out_features: int, in_features: int) -> SkinnyGemmConfig | None:
    """Return how to launch a GEMM of e4m3 codes; None for torch's.

    From `python -m dispec.bench.fp8_kernels` on an H100 with the shapes of Qwen2.5-7B.
    """
    if num_tokens > 64 and out_features % 16 == in_features % 16 == 0:
        return None
    if in_features % 16:
        return SkinnyGemmConfig(64, 64, 1, 8, 3)
    if device.architecture == "fallback":
        return SkinnyGemmConfig(64, 128, 1, 4, 3)
    tiles = max(out_features // 64, 1)
    if tiles >= device.multiprocessors:
        return SkinnyGemmConfig(64, 256, 1, 4, 3) if num_tokens <= 32 else SkinnyGemmConfig(64, 128, 1, 4, 4)
    # The longer the rows, the less it costs to sum their splits.
    programs = device.multiprocessors if in_features <= 8192 else 3 * device.multiprocessors // 2
    return SkinnyGemmConfig(64, 128, max(programs // tiles, 1), 4, 6)


def choose_quantized_linear(
    device: Device, num_tokens: int, out_features: int, in_features: int, kind: str
) -> QuantizedGemmConfig:
    """Return how to launch a GEMM with int4 or int8 weights.

    From `python -m dispec.bench.quantized_kernels` on an H100 with the shapes of Qwen2.5-7B and 1.5B, in groups of 128;
    used on other devices as well.
    """
    is_wide = out_features >= 64 * 2 * device.multiprocessors  # the gate and up projections and the head
    if num_tokens > 64:
        if is_wide and num_tokens <= 512:
            return QuantizedGemmConfig(128, 1, 4, 3, 64)
        return QuantizedGemmConfig(0, 1, 4, 1)
    if is_wide:
        if num_tokens > 16:
            return QuantizedGemmConfig(128, 1, 4, 3)
        return QuantizedGemmConfig(32, 1, 2, 3) if kind == "int8" else QuantizedGemmConfig(64, 1, 2, 3)
    tiles = -(-out_features // 64)
    splits = min(-(-4 * device.multiprocessors // tiles), 12, max(in_features // 256, 1))
    return QuantizedGemmConfig(64, splits, 2 if num_tokens <= 16 else 4, 3)
