"""Memory that another process of this host and user may map: a memfd.

It has no name in a file system, so the kernel frees it with its last user, however a process ends. Another process
opens it through `/proc`, which the kernel allows to processes of the same user.
"""

import fcntl
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

Handle = tuple[int, int, int]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class SharedMemory:
    """A descriptor, and the same bytes as a tensor."""

    fd: int
    tensor: UInt8[Tensor, " num_bytes"]


def allocate(num_bytes: int) -> SharedMemory:
    """Return zeroed shared memory. The kernel provides a page when it is first written.

    Raises OSError on systems other than Linux, ValueError if `num_bytes` is not positive.
    """
    if num_bytes <= 0:
        raise ValueError(f"num_bytes is {num_bytes}, must be more than 0")
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd_create")
    fd = os.memfd_create("dispec-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    # A process that maps memory which then shrinks dies of SIGBUS.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    memory = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    return SharedMemory(fd, torch.frombuffer(memory, dtype=torch.uint8))


def host_id() -> str:
    """Return an id of the running kernel; empty where there is none, which equals no other."""
    return _BOOT_ID.read_text(encoding="ascii").strip() if _BOOT_ID.exists() else ""


def export(memory: SharedMemory) -> Handle:
    """Return what another process of this user needs to map the memory: (process, descriptor, inode)."""
    return os.getpid(), memory.fd, os.fstat(memory.fd).st_ino


def map_read_only(handle: Handle) -> UInt8[np.ndarray, " num_bytes"]:
    """Map a peer's memory read-only.

    Raises OSError if the kernel refuses it, ValueError if the handle leads elsewhere, as with another namespace of
    process numbers, or if the peer could shrink the memory.
    """
    process, descriptor, inode = handle
    fd = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if os.fstat(fd).st_ino != inode or not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("the handle does not lead to sealed shared memory")
        return np.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ), dtype=np.uint8)
    finally:
        os.close(fd)
