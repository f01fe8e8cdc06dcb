"""`dispec env-check`: what this machine has, what works on it, and the parts of DiSpec that will therefore work."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from dispec.engine.machine.cache_directory import cache_directory, check_writable
from dispec.engine.machine.cpu_cores import usable_cores
from dispec.engine.machine.memory import usable_memory

if TYPE_CHECKING:  # it imports torch, which `findings` reports if it is broken
    from dispec.engine.environment import Outcome

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of /proc/cpuinfo, that speed up bf16
_CPU_FEATURES = {
    "eager CPU": ["cpu engine"],
    "compiled CPU": ["cpu engine", "cpu compiler"],
    "CPU kernels": ["cpu kernels"],
    "packed bf16": ["cpu bf16", "cpu packed bf16"],
}
_CUDA_FEATURES = {
    "CUDA with Triton kernels": ["bf16", "engine"],
    "CUDA graphs": ["engine", "compiler", "graphs"],
}


class Finding(NamedTuple):
    """A line of the report. `data` is its JSON form; features depend on its `works`."""

    name: str
    text: str
    data: Any

    def __str__(self) -> str:
        return f"{self.name:<20} {self.text}"


class Feature(NamedTuple):
    """A part of DiSpec, and the reason if it will not work here."""

    name: str
    works: bool
    reason: str

    def __str__(self) -> str:
        return f"  {self.name:<25} {'yes' if self.works else f'no: {self.reason}'}"


def findings() -> Iterator[Finding]:
    """Probe the machine and yield each finding as soon as it is known: compiling takes seconds.

    Raises ValueError for a wrong `DISPEC_CPU_ISA`, `DISPEC_CPU_KERNELS` or `DISPEC_CUDA_KERNELS`.
    """
    python = platform.python_version()
    yield Finding("python", f"{python} ({sys.executable})", {"version": python, "executable": sys.executable})
    yield Finding("platform", platform.platform(), platform.platform())
    yield _cpu()
    memory = usable_memory()
    sizes = {"free_bytes": memory.available, "total_bytes": memory.total}
    yield Finding("memory", _free(**sizes), sizes)
    yield _cache()
    try:
        from dispec.engine import environment
    except Exception as error:  # a broken torch fails in many ways
        yield _broken("torch", "cannot be imported", error)
        return
    versions = environment.versions()
    built = f"built for CUDA {versions['cuda']}" if versions["cuda"] else "built without CUDA"
    data = {"works": True, "version": versions["torch"], "cuda": versions["cuda"]}
    yield Finding("torch", f"{versions['torch']}, {built}", data)
    threads = environment.threads()
    yield Finding("threads", f"{threads} for a step, unless --threads says otherwise", {"threads": threads})
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    yield Finding("triton", triton or "not installed", {"version": triton})

    def tried_on(device: str) -> Iterator[Finding]:
        yield _tried(f"{device} bf16", environment.try_bf16(device))
        yield _tried(f"{device} engine", environment.try_engine(device))
        compiler = environment.try_compiler(device)
        yield _tried(f"{device} compiler", compiler)
        for dtype, plan in environment.plans(device, compiles=compiler.works).items():
            yield Finding(f"plan {device} {dtype}", plan.describe(), dataclasses.asdict(plan))

    name, is_forced = environment.cpu_instruction_set(), bool(os.environ.get("DISPEC_CPU_ISA"))
    kernels = _tried("cpu kernels", environment.try_cpu_kernels())
    text = f"{kernels.text}, {name}{' by DISPEC_CPU_ISA' if is_forced else ''}"
    data = kernels.data | {"instruction_set": name, "is_forced": is_forced}
    yield Finding("cpu kernels", text if data["works"] else kernels.text, data)
    warnings.filterwarnings("ignore", "the CPU kernels could not be built")  # the line above says so
    yield from tried_on("cpu")
    yield _tried("cpu packed bf16", environment.try_packed_bf16())
    environment.uses_cuda_kernels()  # raises ValueError without a Hopper GPU too
    devices = environment.cuda_devices()
    if not devices:
        yield Finding("cuda", "torch sees no device", {"devices": []})
    for device in devices:
        free = _free(device.free_bytes, device.total_bytes)
        yield Finding(device.name, f"{device.title}, capability {device.capability}, {free}", device._asdict())
        if device.capability == "9.0":
            yield _tried(f"{device.name} c++ kernels", environment.try_cuda_kernels())
        yield from tried_on(device.name)
        yield _tried(f"{device.name} graphs", environment.try_replay(device.name))


def _tried(name: str, outcome: "Outcome") -> Finding:
    text = f"works ({outcome.seconds:.1f} s)" if outcome.works else f"does not work: {outcome.reason}"
    return Finding(name, text, outcome._asdict())


def features(found: Iterable[Finding]) -> list[Feature]:
    """Return what will work, given the findings. A feature of CUDA must work on every device."""
    data = {finding.name: finding.data for finding in found}
    if not data["torch"]["works"]:
        return [Feature(name, False, "torch cannot be imported") for name in _CPU_FEATURES]
    devices = [name for name in data if name.startswith("cuda:") and " " not in name]
    needs = dict(_CPU_FEATURES)
    for name, parts in _CUDA_FEATURES.items():
        needs[name] = [f"{device} {part}" for device in devices for part in parts]
    missing = "torch sees no CUDA device" if data["torch"]["cuda"] else "this torch is built without CUDA"
    made = []
    for name, probes in needs.items():
        failed = [f"{probe}: {data[probe]['reason']}" for probe in probes if not data[probe]["works"]]
        reason = failed[0] if failed else "" if probes else missing
        made.append(Feature(name, not reason, reason))
    return made


def can_run(report: Iterable[Feature]) -> bool:
    """Return whether DiSpec works here at all."""
    return any(feature.works for feature in report if feature.name == "eager CPU")


def as_json(found: Iterable[Finding], report: Iterable[Feature]) -> dict[str, Any]:
    """Return the report as `{"findings": {name: data}, "features": {name: {works, reason}}}`."""
    return {
        "findings": {finding.name: finding.data for finding in found},
        "features": {feature.name: {"works": feature.works, "reason": feature.reason} for feature in report},
    }


def _cpu() -> Finding:
    info: dict[str, str] = {}
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = info.get("model name") or platform.processor() or platform.machine()
    flags = [flag for flag in _CPU_FLAGS if flag in info.get("flags", "").split()]
    usable = usable_cores()
    cores = psutil.cpu_count(logical=False) or usable
    text = f"{model}, {cores} cores, {usable} usable; {', '.join(flags) or 'no AVX'}"
    return Finding("cpu", text, {"model": model, "cores": cores, "usable_threads": usable, "flags": flags})


def _cache() -> Finding:
    try:
        directory = cache_directory()
        check_writable(directory)
        free = shutil.disk_usage(directory).free
    except (OSError, ValueError) as error:
        return _broken("cache", "not writable", error)
    data = {"works": True, "directory": str(directory), "free_bytes": free}
    return Finding("cache", f"{directory}, writable, {free / 2**30:.1f} GiB free", data)


def _broken(name: str, problem: str, error: Exception) -> Finding:
    reason = " ".join(str(error).split())
    return Finding(name, f"{problem}: {reason}", {"works": False, "reason": reason})


def _free(free_bytes: float, total_bytes: float) -> str:
    return f"{free_bytes / 2**30:.1f} GiB free of {total_bytes / 2**30:.1f} GiB"
