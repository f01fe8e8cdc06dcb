"""CUDA C++ kernels, compiled for this device by NVRTC the first time they are needed.

torch's CUDA wheels bring NVRTC and `cuda.bindings`. The kernels include no headers but those of this folder, so that
nothing else is needed: neither nvcc nor the CUDA toolkit. Cubins are kept in the cache directory.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
HOPPER = "sm_90a"
_ARCHITECTURES = {(9, 0): HOPPER}  # by compute capability: those that the kernels are written for
_OPTIONS = ("--std=c++17",)
# Values of the driver's enumerations (cuda.h).
_DATA_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_MAX_DYNAMIC_SHARED_BYTES = 8
Dimensions = tuple[int, int, int]


def is_enabled() -> bool:
    """Return whether `DISPEC_CUDA_KERNELS` is `on`, the default. Raises ValueError if it is neither `on` nor `off`."""
    value = os.environ.get("DISPEC_CUDA_KERNELS") or "on"
    if value not in ("on", "off"):
        raise ValueError(f"DISPEC_CUDA_KERNELS is {value!r}, must be on or off")
    return value == "on"


@functools.cache
def is_available(device: torch.device) -> bool:
    """Return whether kernels can be built for a device: a Hopper GPU, with NVRTC, and not `DISPEC_CUDA_KERNELS=off`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) not in _ARCHITECTURES or not is_enabled():
        return False
    return has_nvrtc()


@functools.cache
def has_nvrtc() -> bool:
    """Return whether `cuda.bindings` is installed and finds NVRTC."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError):
        return False
    return True


class Kernel:
    """A kernel on one device."""

    def __init__(self, cubin: bytes, name: str, device: torch.device):
        self._device, self._shared_limit = device, 48 * 1024
        torch.cuda.current_stream(device)  # initialises the driver and the context that torch uses
        self._cubin = cubin  # the driver may read it as long as the library is loaded
        library, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuLibraryLoadData", ctypes.byref(library), cubin, None, None, 0, None, None, 0)
        _call("cuLibraryGetKernel", ctypes.byref(self._function), library, name.encode())

    def launch(self, grid: Dimensions, block: Dimensions, shared_bytes: int, *arguments: Any) -> None:
        """Launch on torch's current stream of the device; a CUDA graph may record it.

        shared_bytes: dynamic shared memory of a block. arguments, as many as the kernel takes: a tensor is passed as a
        pointer to its first element, an int as `long long`, a float as `float`, a result of `tensor_map` as a 128-byte
        `__grid_constant__` structure, another ctypes object as it is.
        """
        if shared_bytes > self._shared_limit:
            device = torch.cuda.current_device() if self._device.index is None else self._device.index
            _call("cuKernelSetAttribute", _MAX_DYNAMIC_SHARED_BYTES, shared_bytes, self._function, device)
            self._shared_limit = shared_bytes
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        _call("cuLaunchKernel", self._function, *grid, *block, shared_bytes, stream, pointers, None)


def kernel(source: str, name: str, constants: Mapping[str, int], device: torch.device) -> Kernel | None:
    """Return the `extern "C"` kernel `name` of `ops/cuda/SOURCE`, with `constants` defined as macros.

    Returns None where `is_available` is False, and where the build fails, with a warning. Results are kept.
    """
    return _kernel(source, name, tuple(sorted(constants.items())), device)


@functools.cache
def _kernel(source: str, name: str, constants: tuple[tuple[str, int], ...], device: torch.device) -> Kernel | None:
    if not is_available(device):
        return None
    try:
        architecture = _ARCHITECTURES[torch.cuda.get_device_capability(device)]
        return Kernel(cubin(source, dict(constants), architecture), name, device)
    except RuntimeError as error:
        warnings.warn(
            f"the CUDA kernel {name} could not be built, running slower without it: {error}"
            " (DISPEC_CUDA_KERNELS=off silences this)",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def cubin(source: str, constants: Mapping[str, int], architecture: str) -> bytes:
    """Return the machine code of `ops/cuda/SOURCE`, from the cache directory or from NVRTC.

    Many processes may call this at once. Raises RuntimeError with the compiler's first error.
    """
    from cuda.bindings import nvrtc

    headers = {path.name: path.read_bytes() for path in sorted(_FOLDER.glob("*.cuh"))}
    options = (f"--gpu-architecture={architecture}", *_OPTIONS, *(f"-D{key}={constants[key]}" for key in constants))
    parts = ((_FOLDER / source).read_bytes(), *headers.values(), " ".join(options), nvrtc.nvrtcVersion()[1:])
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
    chosen = os.environ.get("DISPEC_CACHE_DIR") or platformdirs.user_cache_dir("dispec")
    target = Path(chosen).expanduser() / "cuda-kernels" / f"{digest}.cubin"
    try:
        return target.read_bytes()
    except OSError:
        built = _compile(source, parts[0], headers, options)
    with contextlib.suppress(OSError):  # the cache cannot be written; the engine warns of it
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as scratch:
            scratch.write(built)
        Path(scratch.name).replace(target)
    return built


def _compile(name: str, source: bytes, headers: dict[str, bytes], options: tuple[str, ...]) -> bytes:
    from cuda.bindings import nvrtc

    names = [header.encode() for header in headers]
    program = _check(nvrtc.nvrtcCreateProgram(source, name.encode(), len(names), [*headers.values()], names))
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]:
            log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            lines = log.decode(errors="replace").strip("\0\n ").splitlines() or ["NVRTC fails"]
            raise RuntimeError(next((line for line in lines if "error" in line), lines[0]))
        built = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc.nvrtcGetCUBIN(program, built))
        return bytes(built)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@functools.lru_cache(maxsize=4096)
def tensor_map(
    address: int,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> "ctypes.Array[ctypes.c_char]":
    """Return what the tensor memory accelerator needs to copy boxes of a tensor to shared memory, 128 bytes.

    address: of the first element, a multiple of 16. sizes, strides, box: of up to 5 dimensions, the innermost, which is
    dense, first. strides: in bytes, of all dimensions but the innermost, multiples of 16. swizzle: 0, 32, 64 or 128
    bytes, at least the box's innermost bytes (but for 0). Elements out of bounds read as 0. Results are kept.
    """
    backing = bytearray(256)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(backing)) % 128  # the driver wants 64-byte alignment
    made = (ctypes.c_char * 128).from_buffer(backing, start)
    rank = len(sizes)
    _call(
        "cuTensorMapEncodeTiled",
        made,
        _DATA_TYPES[dtype],
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * rank)(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,  # no interleaving
        _SWIZZLES[swizzle],
        3,  # L2 fetches 256 bytes
        0,  # out of bounds is 0
    )
    return made


def _value(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


@functools.cache
def _driver() -> ctypes.CDLL:
    # Not through cuda.bindings: its tensor maps are not aligned as the driver wants them (13.0).
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the driver. Raises RuntimeError if it fails."""
    if status := getattr(_driver(), name)(*arguments):
        raise RuntimeError(f"{name} returns CUDA error {status}")


def _check(result: tuple[Any, ...]) -> Any:
    """Return the result of a function of NVRTC. Raises RuntimeError if it failed."""
    error, *values = result
    if error:
        raise RuntimeError(f"NVRTC returns {error.name}")
    return values[0] if values else None
