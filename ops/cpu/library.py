"""The C++ kernels as a shared library, built for this very CPU the first time it is asked for.

It takes plain pointers and numbers, so that building needs no header but the compiler's own and takes seconds. Its
OpenMP calls are left open when it is linked, and find the runtime that torch has loaded: two runtimes in a process
would each keep a thread spinning on every core.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import platformdirs

from ops.tracing import constant

_SOURCES = (
    "team.cpp",
    "linear.cpp",
    "attention.cpp",
    "prefill.cpp",
    "kv_cache.cpp",
    "rotary.cpp",
    "argmax.cpp",
    "draw.cpp",
    "layer.cpp",
    "decode.cpp",
)
_HEADERS = ("entries.h", "largest.h", "parts.h", "team.h", "tiles.h", "tiles_avx2.h", "tiles_avx512.h", "vectors.h")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-w")
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64

# What each kernel takes; all of them return nothing.
_ATTENTION = [_POINTER, _NUMBER, *[_POINTER] * 3, _NUMBER, *[_POINTER] * 2, *[_NUMBER] * 6, ctypes.c_float, _POINTER]
_WRITE = [*[_POINTER] * 3, _NUMBER, _POINTER, _NUMBER, _POINTER, *[_NUMBER] * 4]
_ROTATE = [_POINTER, _NUMBER, _POINTER, _POINTER, ctypes.c_float, *[_POINTER] * 3, *[_NUMBER] * 5, *[_POINTER] * 3]
_ARGMAX = [_POINTER, *[_NUMBER] * 3, _POINTER]
_DRAW = [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 5]
_LAYER = [
    *[_POINTER] * 2,
    *[_NUMBER] * 3,
    ctypes.c_float,
    _NUMBER,
    *[_POINTER] * 16,
    _NUMBER,
    *[_POINTER] * 2,
    *[_NUMBER] * 5,
    ctypes.c_float,
]
_SIGNATURES = {
    "dispec_pack": [_POINTER, _POINTER, _NUMBER, _NUMBER],
    "dispec_unpack_rows": [_POINTER, _POINTER, _NUMBER, _NUMBER, _POINTER],
    "dispec_linear": [_POINTER, _NUMBER, _POINTER, ctypes.c_float, _POINTER, _NUMBER, *[_POINTER] * 3, *[_NUMBER] * 4],
    "dispec_argmax_bfloat16": _ARGMAX,
    "dispec_argmax_float32": _ARGMAX,
    "dispec_draw_bfloat16": _DRAW,
    "dispec_draw_float32": _DRAW,
    "dispec_layer": _LAYER,
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

    What it lacks on this CPU is absent: what multiplies by tiles needs AVX512-BF16 or AVX2.
    """
    if os.environ.get("DISPEC_CPU_KERNELS", "on") == "off":
        return None
    try:
        loaded = ctypes.CDLL(str(build()))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = said.strip().splitlines()[0] if said.strip() else type(error).__name__
        warnings.warn(
            f"the CPU kernels could not be built, running slower without them: {reason}"
            " (is a C++ compiler installed? `dispec env-check` tells; DISPEC_CPU_KERNELS=off silences this)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for name, arguments in _SIGNATURES.items():
        if function := getattr(loaded, name, None):
            function.argtypes, function.restype = arguments, None
    return loaded


@constant
def has_kernels() -> bool:
    """Whether there is a library."""
    return library() is not None


def has_linear() -> bool:
    """Whether this CPU has our own packed product."""
    return hasattr(library(), "dispec_linear")


def build() -> Path:
    """The library's file, compiled if it is not there yet. Safe to call from many processes.

    Raises OSError where there is no compiler or no place to write, CalledProcessError where compiling fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("neither g++ nor clang++ was found")
    sources = [Path(__file__).with_name(name) for name in _SOURCES]
    digest = hashlib.sha256(" ".join((*_FLAGS, compiler, _cpu())).encode())
    for path in (*sources, *(Path(__file__).with_name(name) for name in _HEADERS)):
        digest.update(path.read_bytes())
    chosen = os.environ.get("DISPEC_CACHE_DIR") or platformdirs.user_cache_dir("dispec")
    directory = Path(chosen).expanduser() / "cpu-kernels"
    target = directory / f"{digest.hexdigest()[:24]}.so"
    if not target.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            objects = [Path(scratch) / f"{path.stem}.o" for path in sources]
            compilations = [
                subprocess.Popen(
                    [compiler, *_FLAGS, "-c", str(source), "-o", str(made)], stderr=subprocess.PIPE, text=True
                )
                for source, made in zip(sources, objects, strict=True)
            ]
            said = [compilation.communicate()[1] for compilation in compilations]
            for compilation, text in zip(compilations, said, strict=True):
                if compilation.returncode:
                    raise subprocess.CalledProcessError(compilation.returncode, compilation.args, stderr=text)
            built = Path(scratch) / target.name
            # Without -fopenmp: see above.
            command = [compiler, "-shared", "-o", str(built), *map(str, objects)]
            subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
            built.replace(target)
    return target


def _cpu() -> str:
    """What `-march=native` depends on: a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
