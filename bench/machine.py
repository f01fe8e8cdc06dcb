"""What this machine is and what it can do at best: the limits that figures are shares of."""

import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """A machine and its measured rates: reading memory, and multiplying large bf16 matrices."""

    device: str
    cores: int
    python: str
    torch: str
    transformers: str
    dispec: str
    bytes_per_second: float
    flop_per_second: float

    def as_record(self) -> dict[str, object]:
        return asdict(self)

    def describe(self) -> str:
        return (
            f"{self.device}, {self.cores} cores, torch {self.torch}, transformers {self.transformers}; reads"
            f" {self.bytes_per_second / 1e9:.1f} GB/s, multiplies bf16 at {self.flop_per_second / 1e12:.2f} TFLOP/s"
        )


def measure_machine(device: torch.device) -> Machine:
    """Describe the machine and measure its two rates; takes a few seconds."""
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        cores=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=version("transformers"),
        dispec=_commit(),
        bytes_per_second=read_bandwidth(device),
        flop_per_second=matrix_rate(device),
    )


def read_bandwidth(device: torch.device, size: int = 2**30, repeats: int = 7) -> float:
    """Bytes per second of the fastest of several sums over `size` bytes, far more than any cache holds."""
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    return size / min(_seconds(data.sum, device) for _ in range(repeats))


def matrix_rate(device: torch.device, size: int = 2048, repeats: int = 7) -> float:
    """Floating-point operations per second of the fastest of several bf16 products of square matrices."""
    size = 8192 if device.type == "cuda" else size
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: left @ right, device) for _ in range(repeats))


def _seconds(function, device: torch.device) -> float:  # type: ignore[no-untyped-def]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that is checked out, or the installed version where there is no checkout."""
    git = Path(__file__).resolve().parent.parent / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if head.startswith("ref: "):
            return (git / head[5:]).read_text().strip()[:12]
        return head[:12]
    except OSError:
        try:
            return version("dispec")
        except PackageNotFoundError:
            return "unknown"
