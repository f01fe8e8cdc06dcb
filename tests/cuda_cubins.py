"""What the compiler made of a CUDA kernel: registers, memory, instructions."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dispec.ops.cuda.library import cubin, has_nvrtc, is_available

needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="needs cuda.bindings and NVRTC")
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or not is_available(torch.device("cuda")), reason="needs a Hopper GPU and NVRTC"
)


class Usage(NamedTuple):
    """Resources of a kernel: registers of a thread, bytes of its stack and of its local memory."""

    registers: int
    stack_bytes: int
    local_bytes: int


def compiled(source: str, constants: dict[str, int]) -> bytes:
    """Return the machine code of a kernel for Hopper."""
    return cubin(source, constants, "sm_90a")


def _dump(code: bytes, option: str) -> str:
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout


def usage(code: bytes, kernel: str) -> Usage:
    """Return the resources of a kernel of a cubin."""
    found = re.search(rf"Function {kernel}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _dump(code, "-res-usage"))
    assert found, f"no {kernel} in the cubin"
    return Usage(*map(int, found.groups()))


def instructions(code: bytes) -> str:
    """Return the disassembly of a cubin."""
    return _dump(code, "-sass")
