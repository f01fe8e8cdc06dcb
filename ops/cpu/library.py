"""The C++ kernels as a shared library, built for this very CPU the first time it is asked for.

It takes plain pointers and numbers, so that building needs no header but the compiler's own and takes seconds. Its one
OpenMP call, for the number of threads, is left open when it is linked, and finds the runtime that torch has loaded.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import platformdirs

from dispec.ops.tracing import constant

_SOURCES = (
    "thread_pool.cpp",
    "linear.cpp",
    "attention.cpp",
    "prefill.cpp",
    "kv_cache.cpp",
    "rotary.cpp",
    "argmax.cpp",
    "sampling.cpp",
    "layers.cpp",
    "decode.cpp",
)
_HEADERS = (
    "entries.h",
    "largest.h",
    "model.h",
    "parts.h",
    "thread_pool.h",
    "tiles.h",
    "tiles_avx2.h",
    "tiles_avx512.h",
    "vectors.h",
)
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-w")
_BUILD_BYTES = 16 * 2**20  # free on the disk before a compiler is started; objects and library take 2 MiB
_FAILURE_SECONDS = 24 * 3600.0  # for which a compiler that failed is not tried again
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64

# What each kernel takes; all of them return nothing.
_ATTENTION = [_POINTER, _NUMBER, *[_POINTER] * 3, _NUMBER, *[_POINTER] * 2, *[_NUMBER] * 6, ctypes.c_float, _POINTER]
_WRITE = [*[_POINTER] * 3, _NUMBER, _POINTER, _NUMBER, _POINTER, *[_NUMBER] * 4]
_ROTATE = [_POINTER, _NUMBER, _POINTER, _POINTER, ctypes.c_float, *[_POINTER] * 3, *[_NUMBER] * 5, *[_POINTER] * 3]
_ARGMAX = [_POINTER, *[_NUMBER] * 3, _POINTER]
_DRAW = [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 5]
_SIGNATURES = {
    "dispec_pack": [_POINTER, _POINTER, _NUMBER, _NUMBER],
    "dispec_unpack_rows": [_POINTER, _POINTER, _NUMBER, _NUMBER, _POINTER],
    "dispec_linear": [_POINTER, _NUMBER, _POINTER, ctypes.c_float, _POINTER, _NUMBER, *[_POINTER] * 3, *[_NUMBER] * 4],
    "dispec_argmax_bfloat16": _ARGMAX,
    "dispec_argmax_float32": _ARGMAX,
    "dispec_sample_bfloat16": _DRAW,
    "dispec_sample_float32": _DRAW,
    "dispec_layers": [_POINTER] * 4,
    "dispec_decode": [_POINTER, *[_NUMBER] * 2, *[_POINTER] * 3, _NUMBER, *[_POINTER] * 4],
    "dispec_rotate_and_write_bfloat16": _ROTATE,
    "dispec_rotate_and_write_float32": _ROTATE,
    "dispec_paged_attention_bfloat16": _ATTENTION,
    "dispec_paged_attention_float32": _ATTENTION,
    "dispec_prefill_attention": _ATTENTION,
    "dispec_write_kv_bfloat16": _WRITE,
    "dispec_write_kv_float32": _WRITE,
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None, with a warning, where it cannot be built; `DISPEC_CPU_KERNELS=off` does without it.

    A compiler that failed is not tried again for a day. What the library lacks on this CPU is absent: what multiplies
    by tiles needs AVX512-BF16 or AVX2.
    """
    if os.environ.get("DISPEC_CPU_KERNELS", "on") == "off":
        return None
    try:
        loaded = _load()
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"the CPU kernels could not be built, running slower without them: {error}"
            " (is a C++ compiler installed? `dispec env-check` tells; DISPEC_CPU_KERNELS=off silences this)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for name, arguments in _SIGNATURES.items():
        if function := getattr(loaded, name, None):
            function.argtypes, function.restype = arguments, None
    return loaded


def _load() -> ctypes.CDLL:
    target = _target()
    if target.exists():
        return ctypes.CDLL(str(target))
    failure = target.with_suffix(".failed")
    with contextlib.suppress(OSError):
        if time.time() - failure.stat().st_mtime < _FAILURE_SECONDS:
            raise RuntimeError(f"{failure.read_text(encoding='utf-8')}, found at an earlier start")
    try:
        return ctypes.CDLL(str(build()))
    except RuntimeError as error:
        with contextlib.suppress(OSError):
            failure.write_text(str(error), encoding="utf-8")
        raise
    except OSError:  # the cache cannot be written, of which the engine warns
        with tempfile.TemporaryDirectory(prefix="dispec-kernels-") as directory:
            return ctypes.CDLL(str(build(Path(directory))))  # once loaded, it does without its file


@constant
def has_kernels() -> bool:
    """Whether there is a library."""
    return library() is not None


def is_cached() -> bool:
    """Whether the library's file is there for the next start."""
    return _target().exists()


def has_packed_linear() -> bool:
    """Whether this CPU has our own packed product."""
    return hasattr(library(), "dispec_linear")


def build(directory: Path | None = None) -> Path:
    """The library's file, compiled if it is not there yet. Safe to call from many processes.

    directory: where to keep it; None is the cache directory. Raises OSError where it cannot be written, RuntimeError
    with the compiler's reason where there is no compiler or compiling fails.
    """
    target = _target() if directory is None else directory / _target().name
    if target.exists():
        return target
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("neither g++ nor clang++ was found")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < _BUILD_BYTES:
        raise OSError(f"{free / 2**20:.0f} MiB free, {_BUILD_BYTES / 2**20:.0f} needed")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{name}.o" for name in _SOURCES]
        compilations = [
            _run(compiler, *_FLAGS, "-c", str(Path(__file__).with_name(name)), "-o", str(made), scratch=scratch)
            for name, made in zip(_SOURCES, objects, strict=True)
        ]
        _finish(compilations)
        built = Path(scratch) / target.name
        _finish([_run(compiler, "-shared", "-o", str(built), *map(str, objects), scratch=scratch)])
        built.replace(target)
    return target


def _target() -> Path:
    digest = hashlib.sha256(" ".join((*_FLAGS, _compiler() or "", _cpu())).encode())
    for name in (*_SOURCES, *_HEADERS):
        digest.update(Path(__file__).with_name(name).read_bytes())
    chosen = os.environ.get("DISPEC_CACHE_DIR") or platformdirs.user_cache_dir("dispec")
    return Path(chosen).expanduser() / "cpu-kernels" / f"{digest.hexdigest()[:24]}.so"


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _run(*command: str, scratch: str) -> "subprocess.Popen[str]":
    try:  # the compiler's own files belong where ours are: a full /tmp is no reason to fail
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": scratch})
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run ({error.strerror or error})") from error


def _finish(compilations: "list[subprocess.Popen[str]]") -> None:
    """Wait for all; raises RuntimeError with the first one's reason if any failed."""
    said = [compilation.communicate()[1] for compilation in compilations]
    for compilation, text in zip(compilations, said, strict=True):
        if compilation.returncode:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            # The first line may only say which part of the compiler speaks ("Assembler messages:").
            reason = next((line for line in lines if re.search(r"error|No space", line, re.IGNORECASE)), None)
            arguments: Any = compilation.args
            fallback = lines[0] if lines else f"it ended with code {compilation.returncode}"
            raise RuntimeError(f"{arguments[0]} fails: {reason or fallback}")


def _cpu() -> str:
    """What `-march=native` depends on: a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
