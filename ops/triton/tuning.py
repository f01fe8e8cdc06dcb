"""Launch configurations of attention and of kernels that read no weights, and the devices that all of them depend on.

Autotuning inside an opaque op would time kernels while a CUDA graph is recorded, so configurations come from tables. To
retune, run `python -m dispec.bench.kernels --sweep` on the device and copy the printed lines into the table of its
architecture; `tests/test_triton_aot.py` shows whether the new entries spill.
"""

import functools
from typing import NamedTuple

import torch


class DecodeConfig(NamedTuple):
    """How to launch decode attention.

    block_n: positions of a tile. programs_per_multiprocessor: programs to split the batch into, in multiples of the
    device's multiprocessors.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int


class PrefillConfig(NamedTuple):
    """How to launch prefill attention.

    block_m: rows of a tile, where a row is one query head of one token. block_n: positions of a tile.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Device(NamedTuple):
    """The properties of a device that launches depend on."""

    architecture: str
    multiprocessors: int


# (head dimension padded to a power of two, `element_bytes`) -> configuration.
DecodeTable = dict[tuple[int, int], DecodeConfig]
# The same, with one configuration for steps that fill the device with wide tiles and one for shorter steps.
PrefillTable = dict[tuple[int, int], tuple[PrefillConfig, PrefillConfig]]

# Triton's pipeliner divides `num_stages` between the block ids and the pages that they point to: 3 stages load one tile
# ahead, 5 stages two.
DECODE: dict[str, DecodeTable] = {
    "sm_90": {
        (64, 1): DecodeConfig(128, 4, 5, 2),
        (128, 1): DecodeConfig(64, 4, 5, 2),
        (256, 1): DecodeConfig(32, 4, 5, 2),
        (64, 2): DecodeConfig(64, 4, 5, 1),
        (128, 2): DecodeConfig(64, 4, 5, 2),
        (256, 2): DecodeConfig(32, 4, 5, 2),
        (64, 4): DecodeConfig(32, 4, 3, 4),
        (128, 4): DecodeConfig(16, 8, 3, 2),
        (256, 4): DecodeConfig(16, 8, 3, 2),
    },
    "sm_80": {
        (64, 1): DecodeConfig(64, 4, 5, 2),
        (128, 1): DecodeConfig(64, 4, 5, 2),
        (256, 1): DecodeConfig(32, 4, 5, 2),
        (64, 2): DecodeConfig(64, 4, 5, 2),
        (128, 2): DecodeConfig(64, 8, 5, 2),
        (256, 2): DecodeConfig(32, 4, 5, 2),
        (64, 4): DecodeConfig(32, 4, 3, 2),
        (128, 4): DecodeConfig(16, 8, 3, 2),
        (256, 4): DecodeConfig(16, 8, 3, 2),
    },
    # Any other device: fits the 64 to 99 KiB of shared memory of consumer chips.
    "fallback": {
        (64, 1): DecodeConfig(64, 4, 3, 2),
        (128, 1): DecodeConfig(64, 4, 3, 2),
        (256, 1): DecodeConfig(32, 4, 3, 2),
        (64, 2): DecodeConfig(64, 4, 3, 2),
        (128, 2): DecodeConfig(32, 4, 3, 2),
        (256, 2): DecodeConfig(16, 4, 3, 2),
        (64, 4): DecodeConfig(32, 4, 2, 2),
        (128, 4): DecodeConfig(16, 8, 2, 2),
        (256, 4): DecodeConfig(16, 8, 2, 1),
    },
}

PREFILL: dict[str, PrefillTable] = {
    "sm_90": {
        (64, 1): (PrefillConfig(128, 64, 4, 3), PrefillConfig(64, 64, 4, 5)),
        (128, 1): (PrefillConfig(128, 64, 8, 3), PrefillConfig(64, 64, 4, 3)),
        (256, 1): (PrefillConfig(128, 32, 8, 3), PrefillConfig(32, 32, 4, 3)),
        (64, 2): (PrefillConfig(128, 64, 4, 3), PrefillConfig(64, 64, 4, 5)),
        (128, 2): (PrefillConfig(128, 128, 8, 3), PrefillConfig(64, 64, 4, 3)),
        (256, 2): (PrefillConfig(128, 32, 8, 3), PrefillConfig(64, 32, 4, 3)),
        (64, 4): (PrefillConfig(32, 32, 8, 3), PrefillConfig(16, 32, 4, 3)),
        (128, 4): (PrefillConfig(32, 16, 8, 3), PrefillConfig(16, 16, 8, 3)),
        (256, 4): (PrefillConfig(16, 16, 8, 3), PrefillConfig(16, 16, 8, 3)),
    },
    "sm_80": {
        (64, 1): (PrefillConfig(128, 32, 4, 5), PrefillConfig(64, 32, 4, 5)),
        (128, 1): (PrefillConfig(128, 32, 8, 5), PrefillConfig(64, 32, 8, 5)),
        (256, 1): (PrefillConfig(32, 32, 4, 5), PrefillConfig(32, 32, 4, 5)),
        (64, 2): (PrefillConfig(128, 32, 4, 5), PrefillConfig(64, 32, 4, 5)),
        (128, 2): (PrefillConfig(128, 32, 8, 5), PrefillConfig(64, 32, 4, 5)),
        (256, 2): (PrefillConfig(64, 16, 8, 5), PrefillConfig(32, 16, 4, 5)),
        (64, 4): (PrefillConfig(32, 32, 8, 3), PrefillConfig(16, 32, 4, 3)),
        (128, 4): (PrefillConfig(32, 16, 8, 3), PrefillConfig(16, 16, 4, 3)),
        (256, 4): (PrefillConfig(16, 16, 8, 3), PrefillConfig(16, 16, 8, 3)),
    },
    "fallback": {
        (64, 1): (PrefillConfig(64, 32, 4, 3), PrefillConfig(32, 32, 4, 3)),
        (128, 1): (PrefillConfig(64, 32, 4, 3), PrefillConfig(32, 32, 4, 3)),
        (256, 1): (PrefillConfig(32, 32, 4, 3), PrefillConfig(16, 32, 4, 3)),
        (64, 2): (PrefillConfig(64, 32, 4, 3), PrefillConfig(32, 32, 4, 3)),
        (128, 2): (PrefillConfig(64, 32, 4, 3), PrefillConfig(32, 32, 4, 3)),
        (256, 2): (PrefillConfig(32, 16, 4, 3), PrefillConfig(16, 16, 4, 3)),
        (64, 4): (PrefillConfig(16, 32, 4, 2), PrefillConfig(16, 32, 4, 2)),
        (128, 4): (PrefillConfig(16, 16, 8, 2), PrefillConfig(16, 16, 8, 2)),
        (256, 4): (PrefillConfig(16, 16, 8, 1), PrefillConfig(16, 16, 8, 1)),
    },
}

# Fewest positions of a tile of a quantised cache: 16 even and 16 odd ones, the fewest that `tl.dot` adds up.
MIN_QUANTIZED_TILE = 32

# Most positions of a split of decode attention, even where the batch alone fills the device: one long context among
# short ones must not run on a single multiprocessor.
MAX_SPLIT_POSITIONS = 4096

# Positions up to which a context is not split if the batch alone makes an eighth of the wanted programs. On an H200
# 32 contexts of 192 of Qwen2.5-1.5B take 6.8 us in one piece and 10.0 us in splits that a second kernel combines.
MIN_SPLIT_POSITIONS = 512

# Most rows of a decode program, by bytes per element. Verification with many draft tokens and a large group takes
# several programs.
MAX_DECODE_TILE_ROWS = {2: 64, 4: 16}

# Tokens that one program writes to the KV cache, in steps of at least so many tokens; below, one. Neighbouring tokens
# share the memory sectors of a key page (positions are innermost there), which pays once the step fills the device.
TILED_WRITE_TOKENS = 16
MIN_TILED_WRITE_TOKENS = 512

# Most tokens of a step whose kernels start while the one before ends, on Hopper.
MAX_OVERLAP_TOKENS = 64

# Logits that one program of `argmax` reads, and its warps.
ARGMAX_BLOCK = 2048
ARGMAX_WARPS = 4

# Weights that one program of `token_threshold` reads at a time, and its warps. Larger blocks are a little faster at a
# vocabulary of a multiple of 16, but spill at others.
THRESHOLD_BLOCK = 8192
THRESHOLD_WARPS = 32


def element_bytes(query_dtype: torch.dtype, cache_dtype: torch.dtype) -> int:
    """Return the bytes of an element of the cache if tensor cores multiply it, else those of one of the query."""
    return min(cache_dtype.itemsize, query_dtype.itemsize) if query_dtype.itemsize == 2 else query_dtype.itemsize


@functools.cache
def describe(device: torch.device) -> Device:
    """Return the architecture, as the tables name it, and the number of multiprocessors of a device.

    A device other than CUDA (the interpreter in tests) is described as a small fallback device.
    """
    if device.type != "cuda":
        return Device("fallback", 4)
    properties = torch.cuda.get_device_properties(device)
    architecture = f"sm_{properties.major}{properties.minor}"
    return Device(architecture if architecture in DECODE else "fallback", properties.multi_processor_count)
