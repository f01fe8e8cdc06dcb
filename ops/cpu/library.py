"""The C++ kernels as a shared library, built for this CPU the first time it is needed.

The kernels take plain pointers and numbers: building needs no headers but the compiler's own and takes seconds. The one
OpenMP call, for the number of threads, stays unresolved at link time and finds the runtime that torch has loaded.
"""

import contextlib
import ctypes
import enum
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor

from dispec.ops.cpu.instruction_sets import cpu_flags, instruction_set
from dispec.ops.registration import assume_constant_result

_FOLDER = Path(__file__).parent
_SOURCES = sorted(_FOLDER.glob("*.cpp"))
_HEADERS = sorted(_FOLDER.glob("*.h"))
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-w")
_BUILD_BYTES = 16 * 2**20  # free disk space that a build requires; objects and library take 2 MiB
_RETRY_SECONDS = 24 * 3600.0  # between a failed build and the next try
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64

# Dtypes of kernels that exist for several, as in the kernels' names.
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
# `CacheType` of kernels.h for keys and values that are quantised; 0 for those in the dtype of the activations.
CACHE_TYPES = {torch.int8: 1, torch.float8_e4m3fn: 2}
# Argument types of each kernel; all return nothing.
_ATTENTION = [_POINTER, _NUMBER, *[_POINTER] * 3, _NUMBER, *[_POINTER] * 2, *[_NUMBER] * 7, ctypes.c_float, _POINTER]
_ROPE_WRITE = [_POINTER, _NUMBER, _POINTER, _POINTER, ctypes.c_float, *[_POINTER] * 3, *[_NUMBER] * 6, *[_POINTER] * 3]
_ARGMAX = [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 2]
_MASK_TOKENS = [_POINTER, *[_NUMBER] * 3, _POINTER]
_SAMPLE = [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 6]
_SIGNATURES = {
    "dispec_pack": [_POINTER, _POINTER, _NUMBER, _NUMBER],
    "dispec_pack_quantized": [_POINTER, _NUMBER, *[_POINTER] * 3, *[_NUMBER] * 4],
    "dispec_read_rows": [_POINTER, _POINTER, _NUMBER, _NUMBER, _POINTER],
    "dispec_linear": [_POINTER, _NUMBER, _POINTER, ctypes.c_float, *[_POINTER] * 4, *[_NUMBER] * 4],
    "dispec_divide": [_NUMBER, _NUMBER, _POINTER],
    "dispec_layers": [_POINTER] * 4,
    "dispec_decode": [_POINTER, *[_NUMBER] * 2, *[_POINTER] * 3, _NUMBER, *[_POINTER] * 4],
    **{f"dispec_paged_attention_{dtype}": _ATTENTION for dtype in DTYPE_NAMES.values()},
    **{f"dispec_rope_write_{dtype}": _ROPE_WRITE for dtype in DTYPE_NAMES.values()},
    **{f"dispec_argmax_{dtype}": _ARGMAX for dtype in DTYPE_NAMES.values()},
    **{f"dispec_mask_tokens_{dtype}": _MASK_TOKENS for dtype in DTYPE_NAMES.values()},
    **{f"dispec_sample_{dtype}": _SAMPLE for dtype in DTYPE_NAMES.values()},
}


class WeightKind(enum.IntEnum):
    """`WeightKind` of kernels.h."""

    PLAIN = 0
    BFLOAT16 = 1
    INT4 = 2
    INT8 = 3


class Matrix(ctypes.Structure):
    """`Matrix` of kernels.h. Its address is valid as long as the tensor lives."""

    _fields_ = (("data", _POINTER), ("kind", _NUMBER), ("group_size", _NUMBER), ("has_offsets", _NUMBER))


def is_enabled() -> bool:
    """Return whether `DISPEC_CPU_KERNELS` is `on`, the default. Raises ValueError if it is neither `on` nor `off`."""
    value = os.environ.get("DISPEC_CPU_KERNELS") or "on"
    if value not in ("on", "off"):
        raise ValueError(f"DISPEC_CPU_KERNELS is {value!r}, must be on or off")
    return value == "on"


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library, or None with a warning where it cannot be built, or None for `DISPEC_CPU_KERNELS=off`.

    A failed build is not tried again for a day. Where `instruction_set` is PORTABLE, the library lacks the kernels of
    packed weights (linear.cpp, decoder.cpp) and prefill attention. Raises ValueError for a wrong `DISPEC_CPU_ISA` or
    `DISPEC_CPU_KERNELS`.
    """
    if not is_enabled():
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
        if time.time() - failure.stat().st_mtime < _RETRY_SECONDS:
            raise RuntimeError(f"{failure.read_text(encoding='utf-8')}, found at an earlier start")
    try:
        return ctypes.CDLL(str(build()))
    except RuntimeError as error:
        with contextlib.suppress(OSError):
            failure.write_text(str(error), encoding="utf-8")
        raise
    except OSError:  # the cache cannot be written; the engine warns of it
        with tempfile.TemporaryDirectory(prefix="dispec-kernels-") as directory:
            return ctypes.CDLL(str(build(Path(directory))))  # a loaded library needs its file no more


@assume_constant_result
def has_kernels() -> bool:
    """Return whether there is a library."""
    return library() is not None


def is_cached() -> bool:
    """Return whether the next start finds the library's file."""
    return _target().exists()


def has_packed_linear() -> bool:
    """Return whether this CPU has the kernels of packed weights."""
    return hasattr(library(), "dispec_linear")


def built_instruction_set() -> str | None:
    """Return the name of the instruction set whose kernels the library has, None where it lacks packed weights."""
    loaded = library()
    if loaded is None or not has_packed_linear():
        return None
    loaded.dispec_instruction_set.restype = ctypes.c_char_p
    return str(loaded.dispec_instruction_set().decode())


def kernel(name: str, dtype: torch.dtype | None = None) -> Callable[..., None]:
    """Return a kernel of the library, which must have it: `dispec_NAME`, or `dispec_NAME_DTYPE`."""
    return getattr(library(), f"dispec_{name}" if dtype is None else f"dispec_{name}_{DTYPE_NAMES[dtype]}")


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor's data is, None (a null pointer) without a tensor."""
    return None if tensor is None else tensor.data_ptr()


def int32(x: Tensor) -> Tensor:
    """Return integers as the kernels read them: int32, dense in the last dimension."""
    return x if x.dtype is torch.int32 and x.stride(-1) == 1 else x.int().contiguous()


def build(directory: Path | None = None) -> Path:
    """Compile the library if its file does not exist; return the file. Many processes may call this at once.

    directory: where the file belongs; None is the cache directory. Raises OSError if it cannot be written, RuntimeError
    with the compiler's reason if there is no compiler or it fails.
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
        objects = [Path(scratch) / f"{source.name}.o" for source in _SOURCES]
        compilations = [
            _run(compiler, *_flags(), "-c", str(source), "-o", str(made), scratch=scratch)
            for source, made in zip(_SOURCES, objects, strict=True)
        ]
        _finish(compilations)
        built = Path(scratch) / target.name
        _finish([_run(compiler, "-shared", "-o", str(built), *map(str, objects), scratch=scratch)])
        built.replace(target)
    return target


def _target() -> Path:
    digest = hashlib.sha256(" ".join((*_flags(), _compiler() or "", cpu_flags())).encode())
    for path in (*_SOURCES, *_HEADERS):
        digest.update(path.read_bytes())
    chosen = os.environ.get("DISPEC_CACHE_DIR") or platformdirs.user_cache_dir("dispec")
    return Path(chosen).expanduser() / "cpu-kernels" / f"{digest.hexdigest()[:24]}.so"


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, *instruction_set().compiler_flags)


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _run(*command: str, scratch: str) -> "subprocess.Popen[str]":
    try:  # the compiler's temporary files go where the objects are: a full /tmp is no reason to fail
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": scratch})
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run ({error.strerror or error})") from error


def _finish(compilations: "list[subprocess.Popen[str]]") -> None:
    """Wait for all compilations. Raises RuntimeError with the first failure's reason."""
    messages = [compilation.communicate()[1] for compilation in compilations]
    for compilation, text in zip(compilations, messages, strict=True):
        if compilation.returncode:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            # The first line may only name the part of the compiler that failed ("Assembler messages:").
            reason = next((line for line in lines if re.search(r"error|No space", line, re.IGNORECASE)), None)
            arguments: Any = compilation.args
            fallback = lines[0] if lines else f"it ended with code {compilation.returncode}"
            raise RuntimeError(f"{arguments[0]} fails: {reason or fallback}")
