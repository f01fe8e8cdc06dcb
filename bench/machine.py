"""This machine: its description in reports, and its measured bandwidth and matrix rate."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "transformers", "triton", "dispec")


@dataclass(frozen=True)
class Machine:
    """The machine that figures were measured on."""

    device: str
    cores: int
    memory_bytes: int
    threads: str | None  # OMP_NUM_THREADS, None where it is not set

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device: reading memory, and multiplying large bf16 matrices."""

    bytes_per_second: float
    flop_per_second: float

    def as_record(self) -> dict[str, float]:
        return asdict(self)

    def describe(self) -> str:
        return (
            f"reads {self.bytes_per_second / 1e9:.1f} GB/s,"
            f" multiplies bf16 at {self.flop_per_second / 1e12:.2f} TFLOP/s"
        )


def describe_machine(device: "torch.device | None" = None) -> Machine:
    """Describe a device, or without one the CPU, which does not load torch."""
    name = _cpu_name()
    if device is not None and device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(name, cores, psutil.virtual_memory().total, os.environ.get("OMP_NUM_THREADS"))


def choose_device(name: str | None) -> "torch.device":
    """Return the device of that name; without a name CUDA if there is one, else the CPU."""
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def measure_rates(device: "torch.device") -> Rates:
    """Measure the two rates; takes a few seconds."""
    return Rates(read_bandwidth(device), matrix_rate(device))


def read_bandwidth(device: "torch.device", size: int = 2**30, repeats: int = 7) -> float:
    """Return bytes per second of the fastest of several sums over `size` bytes, more than any cache holds."""
    import torch

    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    return size / min(seconds_of(data.sum, device) for _ in range(repeats))


def matrix_rate(device: "torch.device", size: int = 2048, repeats: int = 7) -> float:
    """Return floating-point operations per second of the fastest of several bf16 GEMMs of square matrices.

    In float32 on CPUs for which oneDNN has no bf16 kernels: torch then takes seconds for a GEMM in bf16.
    """
    import torch

    on_cuda = device.type == "cuda"
    size = 8192 if on_cuda else size
    dtype = torch.bfloat16 if on_cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: left @ right, device) for _ in range(repeats))


def seconds_of(function: Callable[[], object], device: "torch.device") -> float:
    """Return the seconds of a call, up to the end of its work on the device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the commit that is checked out, with "-dirty" if files differ from it; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
