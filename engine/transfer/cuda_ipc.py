"""GPU memory of another process on this host, by CUDA IPC."""

import msgspec
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor


class _Handle(msgspec.Struct):
    """The arguments with which CUDA opens an allocation of another process, and where the tensor begins in it.

    handle, size, offset, counter, counter_offset: of torch's `_share_cuda_`. start: in bytes.
    """

    handle: bytes
    size: int
    offset: int
    counter: bytes
    counter_offset: int
    start: int


def export(tensor: Shaped[Tensor, "..."]) -> bytes:
    """Return what `open_memory` needs. Raises RuntimeError where CUDA cannot share the allocation."""
    storage = tensor.untyped_storage()
    _, handle, size, offset, counter, counter_offset, _, _ = storage._share_cuda_()
    start = int(tensor.storage_offset()) * tensor.element_size()
    return msgspec.msgpack.encode(_Handle(handle, size, offset, counter, counter_offset, start))


def open_memory(encoded: bytes, device: torch.device, num_bytes: int) -> UInt8[Tensor, " num_bytes"]:
    """Map the first bytes of an exported tensor for the kernels of `device`.

    The memory may be that of another GPU, even of one that this process does not see (`CUDA_VISIBLE_DEVICES`): CUDA
    opens it for the device that is current here, with peer access over NVLink or PCIe. Contents are not waited for.
    Raises ValueError for a wrong handle, RuntimeError if CUDA refuses it, as without peer access or for a process that
    has ended.
    """
    opened = msgspec.msgpack.decode(encoded, type=_Handle)
    if not 0 <= opened.start <= opened.size - num_bytes:
        raise ValueError(f"{num_bytes} bytes from {opened.start} on do not fit in an allocation of {opened.size} bytes")
    storage = torch.UntypedStorage._new_shared_cuda(
        device.index, opened.handle, opened.size, opened.offset, opened.counter, opened.counter_offset, b"", False
    )
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return whole[opened.start : opened.start + num_bytes]
