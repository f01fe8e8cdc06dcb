"""Kernels of every instruction set that this machine can run, one after the other."""

import ctypes
import functools
from collections.abc import Iterator

import pytest

from dispec.ops.cpu import instruction_sets, library
from dispec.ops.cpu.instruction_sets import INSTRUCTION_SETS, InstructionSet, cpu_flags

_AVX512 = next(item for item in INSTRUCTION_SETS if item.name == "avx512")
EMULATED_AMX = InstructionSet(
    "amx", _AVX512.cpu_flags, (*_AVX512.compiler_flags, "-DDISPEC_AMX", "-DDISPEC_AMX_EMULATED")
)


def usable_instruction_sets() -> list[InstructionSet]:
    """Return the instruction sets whose kernels run here, none on other CPUs than x86."""
    has = cpu_flags().split()
    usable = [item for item in (*INSTRUCTION_SETS, EMULATED_AMX) if all(flag in has for flag in item.cpu_flags)]
    return [item for item in usable if "amx_tile" not in item.cpu_flags or instruction_sets._may_use_tiles()]


def identifier(item: InstructionSet | str) -> str:
    """Return the name of an instruction set, or of another implementation, in the names of tests."""
    if isinstance(item, str):
        return item
    return "emulated-amx" if item is EMULATED_AMX else item.name


@functools.cache
def _built(item: InstructionSet) -> ctypes.CDLL:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "instruction_set", lambda: item)
        built = library.library.__wrapped__()
    assert built is not None
    return built


def use(item: InstructionSet, patch: pytest.MonkeyPatch) -> None:
    """Use the kernels of an instruction set until the patch is undone."""
    built = _built(item)
    patch.setattr(library, "instruction_set", lambda: item)
    patch.setattr(library, "library", lambda: built)


@pytest.fixture(params=usable_instruction_sets(), ids=identifier, scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    """Use the kernels of one instruction set in all tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        use(request.param, patch)
        yield request.param
