"""`dispec env-check`: what this machine has, what was tried on it, and what of DiSpec will therefore work."""

import dataclasses
import importlib.metadata
import platform
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from dispec.engine.machine.cache_directory import cache_directory, check_writable
from dispec.engine.machine.cpu_cores import usable_cores

# What speeds up bf16 on x86, by the names of /proc/cpuinfo.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


class Finding(NamedTuple):
    """One line of the report. `data` is for machines; a False `works` there decides about features."""

    name: str
    text: str
    data: Any


class Feature(NamedTuple):
    """A part of DiSpec, and why it will not work here if it will not."""

    name: str
    works: bool
    reason: str


def findings() -> Iterator[Finding]:
    """Probe the machine and yield each finding as soon as it is known: compiling takes seconds."""
    python = platform.python_version()
    yield Finding("python", f"{python} ({sys.executable})", {"version": python, "executable": sys.executable})
    yield Finding("platform", platform.platform(), platform.platform())
    yield _cpu()
    memory = psutil.virtual_memory()
    yield Finding(
        "memory",
        f"{_gib(memory.available)} free of {_gib(memory.total)}",
        {"free_bytes": memory.available, "total_bytes": memory.total},
    )
    yield _cache()
    try:
        from dispec.engine import environment
    except Exception as error:  # a broken torch fails in many ways, and this command exists to say so
        reason = " ".join(str(error).split())
        yield Finding("torch", f"cannot be imported: {reason}", {"works": False, "reason": reason})
        return
    versions = environment.versions()
    built = f"built for CUDA {versions['cuda']}" if versions["cuda"] else "built without CUDA"
    yield Finding(
        "torch",
        f"{versions['torch']}, {built}",
        {"works": True, "version": versions["torch"], "cuda": versions["cuda"]},
    )
    threads = environment.threads()
    yield Finding("threads", f"{threads} for a step, unless --threads says otherwise", {"threads": threads})
    triton = _version("triton")
    yield Finding("triton", triton or "not installed", {"version": triton})
    yield _tried("cpu kernels", environment.try_cpu_kernels())
    warnings.filterwarnings("ignore", "the CPU kernels could not be built")  # that was said just now
    yield _tried("cpu engine", environment.try_engine("cpu"))
    compiler = environment.try_compiler("cpu")
    yield _tried("cpu compiler", compiler)
    yield _tried("cpu bf16", environment.try_bf16("cpu"))
    yield _tried("cpu packed bf16", environment.try_packed_bf16())
    yield from _plans("cpu", environment.plans("cpu", compiles=compiler.works))
    devices = environment.cuda_devices()
    if not devices:
        yield Finding("cuda", "torch sees no device", {"devices": []})
    for device in devices:
        yield Finding(
            device.name,
            f"{device.title}, capability {device.capability},"
            f" {_gib(device.free_bytes)} free of {_gib(device.total_bytes)}",
            device._asdict(),
        )
        yield _tried(f"{device.name} bf16", environment.try_bf16(device.name))
        yield _tried(f"{device.name} engine", environment.try_engine(device.name))
        compiler = environment.try_compiler(device.name)
        yield _tried(f"{device.name} compiler", compiler)
        yield _tried(f"{device.name} graphs", environment.try_replay(device.name))
        yield from _plans(device.name, environment.plans(device.name, compiles=compiler.works))


def features(found: Iterable[Finding]) -> list[Feature]:
    """What will work, given the findings. On several CUDA devices, a feature must work on all of them."""
    data = {finding.name: finding.data for finding in found}
    if not data["torch"]["works"]:
        reason = "torch cannot be imported"
        return [Feature(name, False, reason) for name in ("eager CPU", "compiled CPU", "CPU kernels", "packed bf16")]
    devices = [name for name in data if name.startswith("cuda:") and " " not in name]
    return [
        _feature("eager CPU", data, ["cpu engine"]),
        _feature("compiled CPU", data, ["cpu engine", "cpu compiler"]),
        _feature("CPU kernels", data, ["cpu kernels"]),
        _feature("packed bf16", data, ["cpu bf16", "cpu packed bf16"]),
        _cuda_feature("CUDA with Triton kernels", data, devices, ("bf16", "engine")),
        _cuda_feature("CUDA graphs", data, devices, ("engine", "compiler", "graphs")),
    ]


def can_run(report: Iterable[Feature]) -> bool:
    """Whether DiSpec works here at all."""
    return any(feature.works for feature in report if feature.name == "eager CPU")


def row(finding: Finding) -> str:
    return f"{finding.name:<20} {finding.text}"


def feature_row(feature: Feature) -> str:
    return f"  {feature.name:<25} {'yes' if feature.works else f'no: {feature.reason}'}"


def as_json(found: Iterable[Finding], report: Iterable[Feature]) -> dict[str, Any]:
    """The report for machines: `{"findings": {name: data}, "features": {name: {works, reason}}}`."""
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
        reason = " ".join(str(error).split())
        return Finding("cache", f"not writable: {reason}", {"works": False, "reason": reason})
    data = {"works": True, "directory": str(directory), "free_bytes": free}
    return Finding("cache", f"{directory}, writable, {_gib(free)} free", data)


def _tried(name: str, outcome: Any) -> Finding:
    text = f"works ({outcome.seconds:.1f} s)" if outcome.works else f"does not work: {outcome.reason}"
    return Finding(name, text, {"works": outcome.works, "reason": outcome.reason, "seconds": outcome.seconds})


def _plans(device: str, plans: dict[str, Any]) -> Iterator[Finding]:
    for dtype, plan in plans.items():
        yield Finding(f"plan {device} {dtype}", plan.describe(), dataclasses.asdict(plan))


def _feature(name: str, data: dict[str, Any], needs: Iterable[str]) -> Feature:
    for need in needs:
        if not data[need]["works"]:
            return Feature(name, False, f"{need}: {data[need]['reason']}")
    return Feature(name, True, "")


def _cuda_feature(name: str, data: dict[str, Any], devices: list[str], needs: Iterable[str]) -> Feature:
    if devices:
        return _feature(name, data, [f"{device} {need}" for device in devices for need in needs])
    built = data["torch"]["cuda"]
    reason = "torch sees no CUDA device" if built else "this torch is built without CUDA"
    return Feature(name, False, reason)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
