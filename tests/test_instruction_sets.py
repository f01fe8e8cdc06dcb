"""The choice of an instruction set, and the library that is built for it."""

import platform
import subprocess
from pathlib import Path

import pytest

from dispec.ops.cpu import instruction_sets, library
from dispec.ops.cpu.instruction_sets import INSTRUCTION_SETS, PORTABLE, InstructionSet
from tests.instruction_sets import instruction_set  # noqa: F401

ALL_FLAGS = {flag for item in INSTRUCTION_SETS for flag in item.cpu_flags}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretend that the CPU has some flags, and that the system grants or refuses AMX tiles."""
    monkeypatch.delenv("DISPEC_CPU_ISA", raising=False)

    def pretend(*flags: str, permits_tiles: bool = True) -> None:
        monkeypatch.setattr(instruction_sets, "cpu_flags", lambda: "flags : fpu " + " ".join(flags))
        monkeypatch.setattr(instruction_sets, "_may_use_tiles", lambda: permits_tiles)

    return pretend


def test_the_best_instruction_set_of_a_cpu(machine):
    machine(*ALL_FLAGS)
    assert instruction_sets.instruction_set().name == "amx"
    machine(*ALL_FLAGS, permits_tiles=False)
    assert instruction_sets.instruction_set().name == "avx512"
    machine(*(ALL_FLAGS - {"amx_tile"}))
    assert instruction_sets.instruction_set().name == "avx512"
    machine(*(ALL_FLAGS - {"avx512_bf16"}))
    assert instruction_sets.instruction_set().name == "avx2"
    machine("avx2", "fma")
    assert instruction_sets.instruction_set() is PORTABLE


def test_a_lower_instruction_set_is_forced(machine, monkeypatch):
    machine(*ALL_FLAGS)
    for item in INSTRUCTION_SETS:
        monkeypatch.setenv("DISPEC_CPU_ISA", item.name)
        assert instruction_sets.instruction_set() is item


def test_an_instruction_set_that_cannot_be_forced_is_refused(machine, monkeypatch):
    machine("avx2", "fma", "f16c")
    monkeypatch.setenv("DISPEC_CPU_ISA", "sse2")
    with pytest.raises(ValueError, match=r"^DISPEC_CPU_ISA is 'sse2', must be one of amx, avx512, avx2$"):
        instruction_sets.instruction_set()
    monkeypatch.setenv("DISPEC_CPU_ISA", "avx512")
    with pytest.raises(ValueError, match=r"^DISPEC_CPU_ISA is 'avx512', but this CPU lacks avx512f, .*avx512_bf16$"):
        instruction_sets.instruction_set()
    machine(*ALL_FLAGS, permits_tiles=False)
    monkeypatch.setenv("DISPEC_CPU_ISA", "amx")
    with pytest.raises(ValueError, match="the system does not permit AMX tiles"):
        instruction_sets.instruction_set()


def test_the_library_has_the_kernels_of_its_instruction_set(instruction_set: InstructionSet):  # noqa: F811
    assert library.built_instruction_set() == instruction_set.name


@pytest.mark.skipif(platform.machine() != "x86_64" or library._compiler() is None, reason="needs a compiler for x86")
@pytest.mark.parametrize("source", ["linear", "prefill_attention"])
def test_kernels_of_amx_compile_on_any_cpu(source: str, tmp_path: Path):
    """Few machines have AMX: elsewhere its instructions are emulated, and the code that uses them is compiled here."""
    flags = ("-std=c++17", "-O1", "-w", "-march=sapphirerapids", "-DDISPEC_AMX", "-c")
    compiler = library._compiler()
    assert compiler is not None
    path = Path(library.__file__).with_name(f"{source}.cpp")
    written, assembly = tmp_path / "object", tmp_path / "assembly"
    subprocess.run([compiler, *flags, str(path), "-o", str(written)], check=True, timeout=120)
    subprocess.run([compiler, *flags, "-S", str(path), "-o", str(assembly)], check=True, timeout=120)
    assert "tdpbf16ps" in assembly.read_text()
