"""The bytes of KV blocks as buffers for a socket, as copies and as checksums. `device_blocks` has those on CUDA.

A cache is two arrays [L, NB, bytes of a block in one layer], keys and values. A block's bytes are its keys of all
layers, then its values of all layers. The source's device decides what its checksum is: XXH3-64
(https://github.com/Cyan4973/xxHash) of the bytes on a CPU, of the rows' folds (`ops.fold_blocks`) on CUDA. Both find
accidents, not forgeries.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import xxhash
from jaxtyping import Int64, UInt8
from torch import Tensor

from dispec import ops
from dispec.engine.transfer.shared_memory import SharedMemory
from dispec.layers.types import KVCache

PendingChecksums = Callable[[], list[bytes]]  # waits for blocks to be in place, and returns their checksums
CopyBlocks = Callable[[Sequence[int], Sequence[int]], list[bytes]]  # from the source's blocks into own; their checksums


class KVBlocks(ABC):
    """The blocks of one KV cache. shape: (L, NB, bytes of a block in one layer) of the keys, and of the values."""

    device: str
    device_index: int = 0
    addresses: tuple[int, int]  # of keys and values

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.num_layers, self.num_blocks, self.layer_bytes = shape
        self.block_bytes = 2 * self.num_layers * self.layer_bytes

    @abstractmethod
    def wait_before_writing(self) -> None:
        """Order writes from now on after what the engine has launched. For the engine's thread alone.

        A step launched before blocks were freed, which may still write to them, has then ended when they are written.
        """

    @abstractmethod
    def wait_until_writable(self) -> None:
        """Wait for what `wait_before_writing` ordered writes after, if something else than this class is to write."""

    @abstractmethod
    def num_checked_at_once(self, read_bytes: int) -> int:
        """Return the number of blocks whose checksums are computed together, if reads have `read_bytes`."""

    @abstractmethod
    def checksums(self, blocks: Sequence[int]) -> list[bytes]:
        """Return the checksum of each block, as this device computes it."""

    @abstractmethod
    def send_buffers(self, blocks: Sequence[int]) -> Iterable[Sequence[memoryview]]:
        """Return buffers with the bytes of blocks, in parts: keys before values, layer by layer, blocks in order.

        They are valid until the same thread calls this method again.
        """

    @abstractmethod
    def receive_buffers(self, blocks: Sequence[int]) -> Sequence[memoryview]:
        """Return buffers to receive blocks into, in the order of `send_buffers`."""

    @abstractmethod
    def finish_receive(self, blocks: Sequence[int], source_device: str) -> PendingChecksums:
        """Write the contents of the same thread's `receive_buffers` to the cache.

        Returns a call, for any thread, that waits for the end and returns the checksums as the source's device does.
        """


class HostBlocks(KVBlocks):
    """Blocks in host memory: keys and values [L, NB, bytes of a block in one layer]."""

    device = "cpu"

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        super().__init__(keys.shape)
        self.halves = (keys, values)
        self.addresses = (keys.ctypes.data, values.ctypes.data)

    @classmethod
    def of_cache(cls, kv_cache: KVCache, shared: SharedMemory | None) -> "HostBlocks":
        """Wrap a KV cache. Raises ValueError if `shared` is not its keys followed by its values, as peers read it."""
        keys, values = (byte_view(half).numpy() for half in kv_cache)
        if shared is not None:
            start = shared.tensor.data_ptr()
            if [half.ctypes.data for half in (keys, values)] != [start, start + keys.nbytes]:
                raise ValueError("kv_cache is not the keys and then the values of the shared memory")
        return cls(keys, values)

    @classmethod
    def of_region(cls, region: np.ndarray, num_layers: int, num_blocks: int, layer_bytes: int) -> "HostBlocks":
        """Wrap a peer's shared memory. Raises ValueError if it is too small."""
        size = 2 * num_layers * num_blocks * layer_bytes
        if region.nbytes < size:
            raise ValueError(f"a KV cache of {size} bytes does not fit in shared memory of {region.nbytes} bytes")
        return cls(*region[:size].reshape(2, num_layers, num_blocks, layer_bytes))

    def wait_before_writing(self) -> None:
        """Do nothing: steps on a CPU have ended when the engine pulls."""

    def wait_until_writable(self) -> None:
        """Do nothing, for the same reason."""

    def num_checked_at_once(self, read_bytes: int) -> int:
        return max(1, read_bytes // self.block_bytes)  # so that the first read need not wait for the last

    def send_buffers(self, blocks: Sequence[int]) -> Iterable[Sequence[memoryview]]:
        return [self.receive_buffers(blocks)]

    def receive_buffers(self, blocks: Sequence[int]) -> Sequence[memoryview]:
        runs = list(_runs(blocks))
        return [
            layer[first : first + count].reshape(-1).data
            for half in self.halves
            for layer in half
            for first, count in runs
        ]

    def finish_receive(self, blocks: Sequence[int], source_device: str) -> PendingChecksums:
        """Return the call alone: the buffers are the cache itself."""
        return lambda: self.checksums(blocks) if source_device == self.device else self._fold_checksums(blocks)

    def copy_block(self, source: "HostBlocks", source_block: int, own_block: int) -> None:
        """Copy one block of all layers from another cache of the same geometry."""
        for own, other in zip(self.halves, source.halves, strict=True):
            own[:, own_block] = other[:, source_block]

    def checksums(self, blocks: Sequence[int]) -> list[bytes]:
        return [self._checksum(block) for block in blocks]

    def _fold_checksums(self, blocks: Sequence[int]) -> list[bytes]:
        """Return checksums as CUDA computes them."""
        keys, values = (torch.from_numpy(half).view(torch.int64) for half in self.halves)
        return fold_digests(ops.fold_blocks(keys, values, torch.tensor(blocks)))

    def _checksum(self, block: int) -> bytes:
        # Row by row in place: gathering them first would write and read all bytes once more.
        return _digest(row for half in self.halves for row in half[:, block])


def row_digests(rows: UInt8[np.ndarray, "rows N num_bytes"]) -> list[bytes]:
    """Return the XXH3-64 of each block's rows."""
    return [_digest(rows[:, block]) for block in range(rows.shape[1])]


def fold_digests(folds: Int64[Tensor, "N rows"]) -> list[bytes]:
    """Return the XXH3-64 of each block's folds on the host."""
    return [xxhash.xxh3_64_digest(row.data) for row in folds.numpy()]


def mismatch(found: Sequence[bytes], expected: Sequence[bytes], first: int) -> str | None:
    """Return what is wrong with blocks, which have indices from `first` on in their transfer; None if nothing."""
    for index, pair in enumerate(zip(found, expected, strict=True), first):
        if pair[0] != pair[1]:
            return f"the checksum of block {index} is wrong: its bytes changed after they were published"
    return None


def _digest(rows: Iterable[np.ndarray]) -> bytes:
    digest = xxhash.xxh3_64()
    for row in rows:
        digest.update(row.data)
    return digest.digest()


def byte_view(half: Tensor) -> Tensor:
    """View keys or values as [L, NB, bytes of a block in one layer]. Raises ValueError if they are not contiguous."""
    if not half.is_contiguous():
        raise ValueError(f"a KV cache of shape {tuple(half.shape)} is not contiguous")
    return half.flatten(2).view(torch.uint8)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of consecutive block numbers."""
    for _, run in itertools.groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
        numbers = [block for _, block in run]
        yield numbers[0], len(numbers)
