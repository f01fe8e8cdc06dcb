"""Kernels of every instruction set that this machine can run, one after the other."""

from collections.abc import Iterator

import pytest

from dispec.ops.cpu import library
from dispec.ops.cpu.instruction_sets import INSTRUCTION_SETS, InstructionSet, cpu_flags


def usable_instruction_sets() -> list[InstructionSet]:
    """Return the instruction sets whose kernels run here, none on other CPUs than x86."""
    has = cpu_flags().split()
    return [item for item in INSTRUCTION_SETS if all(flag in has for flag in item.cpu_flags)]


@pytest.fixture(params=usable_instruction_sets(), ids=lambda item: item.name, scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    """Use the kernels of one instruction set in all tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "instruction_set", lambda: request.param)
        built = library.library.__wrapped__()
        assert built is not None
        patch.setattr(library, "library", lambda: built)
        yield request.param
