"""Memory that another process of this machine may map: a memfd, which the kernel frees with its last user.

It has no name in any file system, so nothing is left over whichever way a process ends.
"""

import fcntl
import mmap
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SHRINK") else 0


@dataclass(frozen=True)
class SharedMemory:
    """A descriptor that can be handed over, and the same bytes as a tensor [num_bytes] of uint8."""

    fd: int
    tensor: Tensor


def is_available() -> bool:
    """Whether this system has memory of this kind: Linux."""
    return hasattr(os, "memfd_create")


def allocate(num_bytes: int) -> SharedMemory:
    """Zeroed memory. The kernel hands out a page only when it is first written.

    Raises OSError where there is no such memory, ValueError if `num_bytes` is not positive.
    """
    if num_bytes <= 0:
        raise ValueError(f"num_bytes is {num_bytes}, must be more than 0")
    if not is_available():
        raise OSError("this system has no memfd_create")
    fd = os.memfd_create("dispec-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)  # who maps it must not be hit by a signal because it shrank
    memory = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    return SharedMemory(fd, torch.frombuffer(memory, dtype=torch.uint8))


def map_read_only(fd: int) -> np.ndarray:
    """A peer's memory as bytes that cannot be written. Raises ValueError if it could shrink below what is mapped."""
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ValueError("the peer's memory is not sealed against shrinking")
    return np.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ), dtype=np.uint8)
