"""The bytes of KV blocks in this machine's memory: as buffers for a socket, as copies, as checksums.

A cache is two arrays [L, NB, bytes of a block in a layer], the keys and the values. A block's bytes are its keys in all
layers, then its values in all layers. Its checksum is XXH3-64 of them (https://github.com/Cyan4973/xxHash): it finds
accidents, not forgeries.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from dispec.engine.transfer.shared_memory import SharedMemory
from dispec.layers.types import KVCache


class HostPages:
    """Keys and values, [L, NB, bytes of a block in a layer] each, in memory that the processor reads."""

    device = "cpu"

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        self.halves = (keys, values)
        self.num_layers, self.num_blocks, self.layer_bytes = keys.shape
        self.block_bytes = 2 * self.num_layers * self.layer_bytes

    @classmethod
    def of(cls, kv_cache: KVCache, shared: SharedMemory | None) -> "HostPages":
        """The pages of a KV cache. Raises ValueError if `shared` is not the keys and then the values, as peers read
        it."""
        keys, values = (block_bytes(pages).numpy() for pages in kv_cache)
        if shared is not None:
            start = shared.tensor.data_ptr()
            if [half.ctypes.data for half in (keys, values)] != [start, start + keys.nbytes]:
                raise ValueError("kv_cache is not the keys and then the values of the shared memory")
        return cls(keys, values)

    @classmethod
    def within(cls, region: np.ndarray, num_layers: int, num_blocks: int, layer_bytes: int) -> "HostPages":
        """The pages of a peer's shared memory. Raises ValueError if it is too small for them."""
        size = 2 * num_layers * num_blocks * layer_bytes
        if region.nbytes < size:
            raise ValueError(f"pages of {size} bytes do not lie in memory of {region.nbytes} bytes")
        return cls(*region[:size].reshape(2, num_layers, num_blocks, layer_bytes))

    def follow(self) -> None:
        """What the engine has launched so far comes before what is done here from now on: no news on a CPU."""

    def outgoing(self, blocks: Sequence[int]) -> list[memoryview]:
        """Buffers to send from: keys before values, layer by layer, blocks in order; neighbours are one buffer."""
        runs = list(_runs(blocks))
        return [
            layer[first : first + count].reshape(-1).data
            for half in self.halves
            for layer in half
            for first, count in runs
        ]

    def incoming(self, blocks: Sequence[int]) -> list[memoryview]:
        """Buffers to receive into, in the order of `outgoing`."""
        return self.outgoing(blocks)

    def arrived(self, blocks: Sequence[int]) -> None:
        """The buffers of `incoming` are full: they are the pages themselves."""

    def copy_block(self, source: "HostPages", theirs: int, own: int) -> None:
        """One block of all layers from other pages with as many layers and bytes."""
        for mine, other in zip(self.halves, source.halves, strict=True):
            mine[:, own] = other[:, theirs]

    def checksums(self, blocks: Sequence[int]) -> list[bytes]:
        """Of each block."""
        return [self._checksum(block) for block in blocks]

    def _checksum(self, block: int) -> bytes:
        # Row by row where they are: gathering them first would write and read all bytes once more.
        digest = xxhash.xxh3_64()
        for half in self.halves:
            for row in half[:, block]:
                digest.update(row.data)
        return digest.digest()

    def verify(self, blocks: Sequence[int], checksums: Sequence[bytes], first: int) -> str | None:
        """What is wrong with blocks that stand for the places from `first` on; None if nothing is."""
        for place, (block, checksum) in enumerate(zip(blocks, checksums, strict=True), first):
            if self._checksum(block) != checksum:
                return f"the checksum of place {place} is wrong: its bytes changed after they were published"
        return None


def block_bytes(pages: Tensor) -> Tensor:
    """Keys or values of all layers as [L, NB, bytes of a block in a layer], without a copy. Raises ValueError if that
    cannot be."""
    if not pages.is_contiguous():
        raise ValueError(f"pages of shape {tuple(pages.shape)} are not contiguous")
    return pages.flatten(2).view(torch.uint8)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of blocks that lie one after another."""
    for _, run in itertools.groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
        members = [block for _, block in run]
        yield members[0], len(members)
