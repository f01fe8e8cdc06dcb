"""The bytes of KV blocks in this machine's memory: as buffers for a socket, as copies, as checksums.

A *plane* is one layer's keys or one layer's values, [blocks, bytes of a block]; a block's bytes are its rows of all
planes in order. Its checksum is XXH3-64 of them (https://github.com/Cyan4973/xxHash): it finds accidents, not
forgeries.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from engine.transfer.shared_memory import SharedMemory
from layers.types import KVCache


class HostPages:
    """Planes in memory that the processor reads. Those of one region with even distances are copied as one array.

    planes: each [NB, bytes of a block in it], uint8, contiguous; offsets: of each within `region`, where they have one.
    """

    device = "cpu"

    def __init__(self, planes: Sequence[np.ndarray], region: np.ndarray | None = None, offsets: Sequence[int] = ()):
        self.planes = list(planes)
        self.offsets = list(offsets)
        self.num_blocks = planes[0].shape[0]
        self.plane_bytes = [plane.shape[1] for plane in planes]
        self.block_bytes = sum(self.plane_bytes)
        self._flat = [plane.reshape(-1).data for plane in planes]
        self._groups = _group(self.planes, region, self.offsets)

    @classmethod
    def of(cls, kv_cache: KVCache, shared: SharedMemory | None) -> "HostPages":
        """The pages of a KV cache; with `shared`, the memory that all of them must lie in."""
        tensors = [pages for layer in kv_cache for pages in layer]
        planes = [plane_bytes(tensor).numpy() for tensor in tensors]
        if shared is None:
            return cls(planes)
        offsets = [tensor.data_ptr() - shared.tensor.data_ptr() for tensor in tensors]
        if any(not 0 <= at <= shared.tensor.numel() - p.nbytes for at, p in zip(offsets, planes, strict=True)):
            raise ValueError("kv_cache has pages outside the shared memory")
        return cls(planes, shared.tensor.numpy(), offsets)

    @classmethod
    def within(cls, region: np.ndarray, offsets: Sequence[int], row_bytes: Sequence[int], blocks: int) -> "HostPages":
        """Pages at places of a region, such as a peer's. Raises ValueError if they do not lie in it."""
        planes = []
        for at, size in zip(offsets, row_bytes, strict=True):
            if not 0 <= at <= region.nbytes - size * blocks:
                raise ValueError(f"pages at {at} do not lie in memory of {region.nbytes} bytes")
            planes.append(region[at : at + size * blocks].reshape(blocks, size))
        return cls(planes, region, offsets)

    def follow(self) -> None:
        """What the engine has launched so far comes before what is done here from now on: no news on a CPU."""

    def outgoing(self, blocks: Sequence[int]) -> list[memoryview]:
        """Buffers to send from: plane by plane, blocks in order; neighbours are one buffer."""
        runs = list(_runs(blocks))
        return [
            flat[first * size : (first + count) * size]
            for flat, size in zip(self._flat, self.plane_bytes, strict=True)
            for first, count in runs
        ]

    def incoming(self, blocks: Sequence[int]) -> list[memoryview]:
        """Buffers to receive into, in the order of `outgoing`."""
        return self.outgoing(blocks)

    def arrived(self, blocks: Sequence[int]) -> None:
        """The buffers of `incoming` are full: they are the pages themselves."""

    def copy_block(self, source: "HostPages", theirs: int, own: int) -> None:
        """One block from other pages of the same plane sizes, in one call where both are laid out alike."""
        alike = [group.shape[::2] for group in self._groups] == [group.shape[::2] for group in source._groups]
        pairs = zip(self._groups, source._groups, strict=True) if alike else None
        if pairs is None:
            for mine, other in zip(self.planes, source.planes, strict=True):
                mine[own] = other[theirs]
            return
        for mine, other in pairs:
            mine[:, own] = other[:, theirs]

    def checksums(self, blocks: Sequence[int]) -> list[bytes]:
        """Of each block."""
        return [self._checksum(block) for block in blocks]

    def _checksum(self, block: int) -> bytes:
        # Row by row where they are: gathering them first would write and read all bytes once more.
        digest = xxhash.xxh3_64()
        for flat, size in zip(self._flat, self.plane_bytes, strict=True):
            digest.update(flat[block * size : (block + 1) * size])
        return digest.digest()

    def verify(self, blocks: Sequence[int], checksums: Sequence[bytes], first: int) -> str | None:
        """What is wrong with blocks that stand for the places from `first` on; None if nothing is."""
        for place, (block, checksum) in enumerate(zip(blocks, checksums, strict=True), first):
            if self._checksum(block) != checksum:
                return f"the checksum of place {place} is wrong: its bytes changed after they were published"
        return None


def plane_bytes(pages: Tensor) -> Tensor:
    """One layer's keys or values as [NB, bytes of a block], without a copy. Raises ValueError if that cannot be."""
    if not pages.is_contiguous():
        raise ValueError(f"pages of shape {tuple(pages.shape)} are not contiguous")
    return pages.view(pages.shape[0], -1).view(torch.uint8)


def _group(planes: list[np.ndarray], region: np.ndarray | None, offsets: list[int]) -> list[np.ndarray]:
    """Planes as few arrays [planes, NB, bytes]: those at even distances in one region are one."""
    if region is None:
        return [plane[None] for plane in planes]
    groups = []
    start = 0
    while start < len(planes):
        shape = planes[start].shape
        stop = start + 1
        step = offsets[stop] - offsets[start] if stop < len(planes) else 0
        while stop < len(planes) and planes[stop].shape == shape and offsets[stop] - offsets[stop - 1] == step > 0:
            stop += 1
        strides = (step if stop - start > 1 else planes[start].nbytes, shape[1], 1)
        whole = np.lib.stride_tricks.as_strided(
            region[offsets[start] :], (stop - start, *shape), strides, writeable=region.flags.writeable
        )
        groups.append(whole)
        start = stop
    return groups


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of blocks that lie one after another."""
    for _, run in itertools.groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
        members = [block for _, block in run]
        yield members[0], len(members)
