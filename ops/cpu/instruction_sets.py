"""The instruction sets that the C++ kernels exist for, and the one that this process uses."""

import ctypes
import functools
import os
import platform
from pathlib import Path
from typing import NamedTuple

_VARIABLE = "DISPEC_CPU_ISA"
# Linux: arch/x86/include/uapi/asm/prctl.h. AMX's tile data is state component 18, which a process must ask for.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


class InstructionSet(NamedTuple):
    """A row of the table below.

    name: as in `DISPEC_CPU_ISA`. cpu_flags: flags of /proc/cpuinfo that a CPU must have. compiler_flags: beside those
    of every build; tiles.h chooses the kernels by the macros that they define.
    """

    name: str
    cpu_flags: tuple[str, ...]
    compiler_flags: tuple[str, ...]


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512_bf16")
# The best first. CPUs with AVX512F and without BF16 (Skylake-X to Ice Lake) run the kernels of AVX2: the products of
# AVX-512 need BF16. On a Zen 5, decode attention of AVX2 takes as long as that of AVX-512, sampling up to 1.3 times.
INSTRUCTION_SETS = (
    InstructionSet("amx", (*_AVX512, "amx_tile", "amx_bf16"), ("-march=native", "-DDISPEC_AMX")),
    InstructionSet("avx512", _AVX512, ("-march=native",)),
    InstructionSet("avx2", _AVX2, ("-march=native", "-mno-avx512f")),
)
# Kernels in portable C++, without those of packed weights and of prefill attention.
PORTABLE = InstructionSet("portable", (), ("-march=native",))


def instruction_set() -> InstructionSet:
    """Return the best instruction set of this CPU, or the one that `DISPEC_CPU_ISA` names.

    Raises ValueError if that is none of ours or needs flags that this CPU lacks.
    """
    has = cpu_flags().split()
    forced = os.environ.get(_VARIABLE)
    if forced:
        chosen = next((item for item in INSTRUCTION_SETS if item.name == forced), None)
        if chosen is None:
            names = ", ".join(item.name for item in INSTRUCTION_SETS)
            raise ValueError(f"{_VARIABLE} is {forced!r}, must be one of {names}")
        if missing := [flag for flag in chosen.cpu_flags if flag not in has]:
            raise ValueError(f"{_VARIABLE} is {forced!r}, but this CPU lacks {', '.join(missing)}")
        if chosen.name == "amx" and not _may_use_tiles():
            raise ValueError(f"{_VARIABLE} is 'amx', but the system does not permit AMX tiles")
        return chosen
    usable = (item for item in INSTRUCTION_SETS if all(flag in has for flag in item.cpu_flags))
    return next((item for item in usable if item.name != "amx" or _may_use_tiles()), PORTABLE)


@functools.cache
def cpu_flags() -> str:
    """Return the CPU's features, which `-march=native` depends on: machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


def _may_use_tiles() -> bool:
    """Ask the kernel for the AMX tile registers, for all threads of this process."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0
