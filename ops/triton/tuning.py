"""Launch configurations, pinned by device architecture, padded head dimension and element size.

Autotuning inside an opaque op would time kernels while a CUDA graph is being captured, so configurations are
looked up instead. To retune, run `python -m dispec.bench.kernels --sweep` on the device and copy the lines it prints
into the table of that architecture; `tests/test_triton_aot.py` then shows whether the new entries spill.
"""

import functools
from typing import NamedTuple

import torch


class DecodeConfig(NamedTuple):
    """How to launch the uniform path. `block_n`: positions per tile; `programs_per_multiprocessor`: how many
    programs to split the batch into, in multiples of the device's multiprocessors."""

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int


class PrefillConfig(NamedTuple):
    """How to launch the ragged path. `block_m`: rows per tile, a row being one query head of one token;
    `block_n`: positions per tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class FewRowsConfig(NamedTuple):
    """How to launch a product of few rows. `block_n`: features per program; `block_k`: columns per tile; `splits`: of
    the columns over programs, 0 for the kernel without tensor cores, which has no `num_stages`."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int = 1


class Device(NamedTuple):
    """What a launch decision may depend on."""

    architecture: str
    multiprocessors: int


# (head dimension padded to a power of two, bytes per element) -> configuration.
DecodeTable = dict[tuple[int, int], DecodeConfig]
# The same, with one configuration for steps that fill the device with wide tiles and one for those that do not.
PrefillTable = dict[tuple[int, int], tuple[PrefillConfig, PrefillConfig]]

# The pipeliner splits `num_stages` between the block ids and the pages that they point to: 3 stages load one tile
# ahead, 5 stages two.
DECODE: dict[str, DecodeTable] = {
    "sm_90": {
        (64, 2): DecodeConfig(64, 4, 5, 1),
        (128, 2): DecodeConfig(32, 4, 5, 1),
        (256, 2): DecodeConfig(32, 4, 5, 2),
        (64, 4): DecodeConfig(32, 4, 3, 4),
        (128, 4): DecodeConfig(16, 8, 3, 2),
        (256, 4): DecodeConfig(16, 8, 3, 2),
    },
    "sm_80": {
        (64, 2): DecodeConfig(64, 4, 5, 2),
        (128, 2): DecodeConfig(64, 8, 5, 2),
        (256, 2): DecodeConfig(32, 4, 5, 2),
        (64, 4): DecodeConfig(32, 4, 3, 2),
        (128, 4): DecodeConfig(16, 8, 3, 2),
        (256, 4): DecodeConfig(16, 8, 3, 2),
    },
    # Anything else: fits the 64 KiB to 99 KiB of shared memory that smaller and newer consumer chips have.
    "fallback": {
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
        (64, 2): (PrefillConfig(128, 64, 4, 3), PrefillConfig(64, 64, 4, 5)),
        (128, 2): (PrefillConfig(128, 128, 8, 3), PrefillConfig(64, 64, 4, 3)),
        (256, 2): (PrefillConfig(128, 32, 8, 3), PrefillConfig(64, 32, 4, 3)),
        (64, 4): (PrefillConfig(32, 32, 8, 3), PrefillConfig(16, 32, 4, 3)),
        (128, 4): (PrefillConfig(32, 16, 8, 3), PrefillConfig(16, 16, 8, 3)),
        (256, 4): (PrefillConfig(16, 16, 8, 3), PrefillConfig(16, 16, 8, 3)),
    },
    "sm_80": {
        (64, 2): (PrefillConfig(128, 32, 4, 5), PrefillConfig(64, 32, 4, 5)),
        (128, 2): (PrefillConfig(128, 32, 8, 5), PrefillConfig(64, 32, 4, 5)),
        (256, 2): (PrefillConfig(64, 16, 8, 5), PrefillConfig(32, 16, 4, 5)),
        (64, 4): (PrefillConfig(32, 32, 8, 3), PrefillConfig(16, 32, 4, 3)),
        (128, 4): (PrefillConfig(32, 16, 8, 3), PrefillConfig(16, 16, 4, 3)),
        (256, 4): (PrefillConfig(16, 16, 8, 3), PrefillConfig(16, 16, 8, 3)),
    },
    "fallback": {
        (64, 2): (PrefillConfig(64, 32, 4, 3), PrefillConfig(32, 32, 4, 3)),
        (128, 2): (PrefillConfig(64, 32, 4, 3), PrefillConfig(32, 32, 4, 3)),
        (256, 2): (PrefillConfig(32, 16, 4, 3), PrefillConfig(16, 16, 4, 3)),
        (64, 4): (PrefillConfig(16, 32, 4, 2), PrefillConfig(16, 32, 4, 2)),
        (128, 4): (PrefillConfig(16, 16, 8, 2), PrefillConfig(16, 16, 8, 2)),
        (256, 4): (PrefillConfig(16, 16, 8, 1), PrefillConfig(16, 16, 8, 1)),
    },
}

# A decode sequence is cut into pieces of at most this many positions even where the batch alone fills the
# device, so that one long context among short ones does not run on a single multiprocessor.
LONGEST_SPLIT = 4096

# Rows of queries that one decode program holds, by bytes per element; more (long verification with a large group)
# take more programs.
WIDEST_DECODE_TILE = {2: 64, 4: 16}

# Tokens that one program of `write_kv` stores. Neighbouring tokens share the memory sectors of a key page
# (positions are innermost there), which pays once there are enough tokens to fill the device anyway.
WRITE_TOKENS_LONG = 16
WRITE_LONG_FROM = 512

# Up to how many rows are normed in the product that needs them. More are by a kernel before it, once for all programs.
FOLDS_NORM_UP_TO = 16

# Elements of the output that one program adds the parts of, in a product whose columns are split.
REDUCE_BLOCK = 256

# Weights that one program of `token_threshold` reads at a time, and its warps. Larger blocks are a little faster where
# the vocabulary is a multiple of 16, but spill where it is not.
THRESHOLD_BLOCK = 8192
THRESHOLD_WARPS = 32


@functools.cache
def describe(device: torch.device) -> Device:
    """The architecture, as the tables name it, and the number of multiprocessors of a device.

    Anything but CUDA (the interpreter in tests) is described as a small fallback device.
    """
    if device.type != "cuda":
        return Device("fallback", 4)
    properties = torch.cuda.get_device_properties(device)
    architecture = f"sm_{properties.major}{properties.minor}"
    return Device(architecture if architecture in DECODE else "fallback", properties.multi_processor_count)


def choose_few_rows(device: Device, rows: int, features: int, columns: int) -> FewRowsConfig | None:
    """The kernel for a product of `rows` rows with a weight [features, columns]; None where torch's was no slower.

    Measured with `python -m dispec.bench.products --sweep` on an H100, over the weights of three models.
    """
    if device.architecture != "sm_90" or columns % 16:
        return None
    tiles = features // 64
    if tiles >= 3 * device.multiprocessors and rows <= 64:
        return FewRowsConfig(128, 128, 1, 4, 4)
    if rows > 32:
        return None
    if tiles >= device.multiprocessors:
        return FewRowsConfig(64, 128, 1, 4, 3)
    if columns > 4096:  # worth a second kernel, so that more programs read
        return FewRowsConfig(64, 128, device.multiprocessors // max(tiles, 1), 4, 5)
    if rows <= 2 and columns < 4096:
        return FewRowsConfig(2, 512, 0, 2)
    if rows <= 8 or (columns == 4096 and rows <= 16):
        return FewRowsConfig(64, 128, 1, 4, 5)
    return None


def choose_product(
    device: Device, rows: int, features: int, columns: int, *, has_norm: bool = False, is_gated: bool = False
) -> FewRowsConfig | None:
    """The kernel for a layer's product of `rows` rows with a weight [features, columns]; None where it is torch's.

    has_norm: its rows are normed first; is_gated: half of its features gate the others.

    From `python -m dispec.bench.layer --sweep` on an H100 with the shapes of Qwen2.5-1.5B, and used on an A100 as well.
    From 17 rows torch's products are faster but for gated ones, from 33 rows those too.
    """
    if device.architecture == "fallback" or features % 16 or columns % 16:
        return None
    if not is_gated and features // 64 >= 3 * device.multiprocessors:
        return None  # the head's product, which `choose_few_rows` knows
    is_long = columns > 2 * features  # a layer's last product, whose features alone make too few programs
    if rows <= 2:
        if has_norm or is_gated:
            return FewRowsConfig(4, 512, 0, 2)
        return FewRowsConfig(2, 1024, 0, 4) if is_long else FewRowsConfig(2, 512, 0, 2)
    if is_gated:
        return FewRowsConfig(64, 128, 1, 4, 3) if rows <= 32 else None
    if rows > 16:
        return None
    if has_norm:
        return FewRowsConfig(16, 128, 1, 2, 5)
    if is_long:
        return FewRowsConfig(64, 128, min(max(device.multiprocessors * 64 // features, 1), 12), 4, 5)
    return FewRowsConfig(16, 512, 1, 4, 3)
