"""The bytes of KV blocks in a GPU's memory: staged through pinned memory, or copied from a peer's on the same device.

Everything runs on a stream of its own, after what the engine had launched when it published; the engine hears of blocks
only when they are in place. The order of bytes is that of `HostPages`.
"""

import math
import threading
from collections.abc import Callable, Sequence

import msgspec
import torch
import xxhash
from torch import Tensor

from dispec.engine.transfer.handshake import Hello
from dispec.engine.transfer.pages import block_bytes
from dispec.layers.types import KVCache


class _Storage(msgspec.Struct):
    """What CUDA needs to open an allocation of another process; torch's `_share_cuda_`, field by field."""

    device: int
    handle: bytes
    size: int
    offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    needs_event: bool


class _Exported(msgspec.Struct):
    """A storage and a place in it, in bytes, for the keys and for the values."""

    storages: list[_Storage]
    offsets: list[int]


_decode = msgspec.msgpack.Decoder(_Exported).decode


class DevicePages:
    """Keys and values on one CUDA device."""

    def __init__(self, kv_cache: KVCache) -> None:
        keys, values = (block_bytes(pages) for pages in kv_cache)
        self.halves = (keys, values)
        self._device = keys.device
        self.device = "cuda"
        self.num_layers, self.num_blocks, self.layer_bytes = keys.shape
        self.block_bytes = 2 * self.num_layers * self.layer_bytes
        # Eight bytes at a time: gathering is by elements.
        self._lane = torch.int64 if self.layer_bytes % 8 == 0 else torch.uint8
        self._wide = (keys.view(self._lane), values.view(self._lane))
        self._stream = torch.cuda.Stream(self._device)
        self._local = threading.local()

    def follow(self) -> None:
        """What the engine's stream has been given so far comes before what is done here from now on.

        So blocks are complete when they are read, and a step launched before blocks were given back, which may still
        write to them, has ended when they are written. Only the engine's thread calls this.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def outgoing(self, blocks: Sequence[int]) -> list[memoryview]:
        """Blocks as published, in pinned memory, which stays theirs until this thread's next call."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            where = torch.tensor(blocks, device=self._device)
            gathered = torch.cat([half.index_select(1, where) for half in self._wide])
            return [self._to_host(gathered).numpy().data]

    def incoming(self, blocks: Sequence[int]) -> list[memoryview]:
        """Pinned memory to receive into; `arrived` takes it from there."""
        return [self._staging(len(blocks) * self.block_bytes).numpy().data]

    def arrived(self, blocks: Sequence[int]) -> None:
        """Write what this thread's `incoming` got into the pages."""
        staged = self._staging(len(blocks) * self.block_bytes)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            where = torch.tensor(blocks, device=self._device)
            received = staged.to(self._device, non_blocking=True).view(self._lane)
            parts = received.view(2, self.num_layers, len(blocks), self._wide[0].shape[2])
            for half, part in zip(self._wide, parts, strict=True):
                half.index_copy_(1, where, part)
        self._stream.synchronize()

    def checksums(self, blocks: Sequence[int]) -> list[bytes]:
        """Of each block, whose bytes are gathered in the order of `HostPages`."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            where = torch.tensor(blocks, device=self._device)
            gathered = torch.cat([half.index_select(1, where) for half in self._wide])
            staged = self._to_host(gathered.transpose(0, 1).contiguous())
        return [xxhash.xxh3_64_digest(row.data) for row in staged.numpy().reshape(len(blocks), -1)]

    def verify(self, blocks: Sequence[int], checksums: Sequence[bytes], first: int) -> str | None:
        """What is wrong with blocks that stand for the places from `first` on; None if nothing is."""
        for place, (found, checksum) in enumerate(zip(self.checksums(blocks), checksums, strict=True), first):
            if found != checksum:
                return f"the checksum of place {place} is wrong: its bytes changed after they were published"
        return None

    def export(self) -> bytes:
        """Handles of the allocations that the pages lie in, for a process that uses the same device."""
        exported = _Exported([], [])
        for half in self.halves:
            exported.storages.append(_Storage(*half.untyped_storage()._share_cuda_()))
            exported.offsets.append(int(half.storage_offset()))
        return msgspec.msgpack.encode(exported)

    def open(self, metadata: bytes, peer: Hello) -> Callable[[Sequence[int], Sequence[int]], None]:
        """A copy from a peer's pages. Raises ValueError or RuntimeError if they cannot be opened."""
        exported = _decode(metadata)
        shape = (peer.num_layers, peer.num_blocks, peer.layer_bytes)
        theirs = []
        for storage, offset in zip(exported.storages, exported.offsets, strict=True):
            opened = torch.UntypedStorage._new_shared_cuda(*msgspec.structs.astuple(storage))
            whole = torch.empty(0, dtype=torch.uint8, device=opened.device).set_(opened)
            theirs.append(whole[offset : offset + math.prod(shape)].view(shape).view(self._lane))

        def copy(source_blocks: Sequence[int], own_blocks: Sequence[int]) -> None:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                source = torch.tensor(source_blocks, device=self._device)
                own = torch.tensor(own_blocks, device=self._device)
                for mine, other in zip(self._wide, theirs, strict=True):
                    mine.index_copy_(1, own, other.index_select(1, source.to(other.device)).to(self._device))
            self._stream.synchronize()

        return copy

    def _to_host(self, gathered: Tensor) -> Tensor:
        """Its bytes in this thread's pinned memory, in one copy: a copy for each layer of each block would take a
        hundred times as long."""
        staged = self._staging(gathered.numel() * gathered.element_size())
        staged.copy_(gathered.view(torch.uint8).flatten(), non_blocking=True)
        self._stream.synchronize()
        return staged

    def _staging(self, num_bytes: int) -> Tensor:
        held: Tensor | None = getattr(self._local, "staging", None)
        if held is None or held.numel() < num_bytes:
            held = self._local.staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return held[:num_bytes]
