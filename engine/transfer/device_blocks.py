"""KV blocks in a GPU's memory: staged through pinned memory, or copied from a process on the same device by CUDA IPC.

Everything runs on a stream of its own, after what the engine had launched when it published. The engine is told of
blocks only when they are in place.
"""

import math
import threading
from collections.abc import Callable, Sequence

import msgspec
import torch
import xxhash
from torch import Tensor

from dispec.engine.transfer.handshake import Hello
from dispec.engine.transfer.kv_blocks import KVBlocks, byte_view
from dispec.layers.types import KVCache


class _Storage(msgspec.Struct):
    """The arguments with which CUDA opens an allocation of another process; torch's `_share_cuda_`, field by field."""

    device: int
    handle: bytes
    size: int
    offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    needs_event: bool


class _Exported(msgspec.Struct):
    """The storages of keys and values, and the offset of each in its storage, in bytes."""

    storages: list[_Storage]
    offsets: list[int]


class DeviceBlocks(KVBlocks):
    """Blocks of a KV cache on one CUDA device."""

    device = "cuda"

    def __init__(self, kv_cache: KVCache) -> None:
        keys, values = (byte_view(half) for half in kv_cache)
        super().__init__(keys.shape)
        self._device = keys.device
        self._bytes = (keys, values)
        # Eight bytes an element where possible: a gather works by elements.
        self._dtype = torch.int64 if self.layer_bytes % 8 == 0 else torch.uint8
        self._halves = (keys.view(self._dtype), values.view(self._dtype))
        self._stream = torch.cuda.Stream(self._device)
        self._local = threading.local()

    def wait_for_engine(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def send_buffers(self, blocks: Sequence[int]) -> list[memoryview]:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            return [self._to_host(self._gather(blocks)).numpy().data]

    def receive_buffers(self, blocks: Sequence[int]) -> list[memoryview]:
        return [self._staging(len(blocks) * self.block_bytes).numpy().data]

    def finish_receive(self, blocks: Sequence[int]) -> None:
        staged = self._staging(len(blocks) * self.block_bytes)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            where = torch.tensor(blocks, device=self._device)
            received = staged.to(self._device, non_blocking=True).view(self._dtype)
            parts = received.view(2, self.num_layers, len(blocks), -1)
            for half, part in zip(self._halves, parts, strict=True):
                half.index_copy_(1, where, part)
        self._stream.synchronize()

    def checksums(self, blocks: Sequence[int]) -> list[bytes]:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            staged = self._to_host(self._gather(blocks).transpose(0, 1).contiguous())
        return [xxhash.xxh3_64_digest(row.data) for row in staged.numpy().reshape(len(blocks), -1)]

    def export(self) -> bytes:
        """Return handles of the cache's allocations, for a process that uses the same device."""
        storages = [_Storage(*half.untyped_storage()._share_cuda_()) for half in self._bytes]
        return msgspec.msgpack.encode(_Exported(storages, [int(half.storage_offset()) for half in self._bytes]))

    def open(self, metadata: bytes, peer: Hello) -> Callable[[Sequence[int], Sequence[int]], None]:
        """Return a copy from a peer's blocks into own ones. Raises ValueError or RuntimeError if they do not open."""
        exported = msgspec.msgpack.decode(metadata, type=_Exported)
        shape = (peer.num_layers, peer.num_blocks, peer.layer_bytes)
        peer_halves = []
        for storage, offset in zip(exported.storages, exported.offsets, strict=True):
            opened = torch.UntypedStorage._new_shared_cuda(*msgspec.structs.astuple(storage))
            whole = torch.empty(0, dtype=torch.uint8, device=opened.device).set_(opened)
            peer_halves.append(whole[offset : offset + math.prod(shape)].view(shape).view(self._dtype))

        def copy(source_blocks: Sequence[int], own_blocks: Sequence[int]) -> None:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                own = torch.tensor(own_blocks, device=self._device)
                for half, peer_half in zip(self._halves, peer_halves, strict=True):
                    source = torch.tensor(source_blocks, device=peer_half.device)
                    half.index_copy_(1, own, peer_half.index_select(1, source).to(self._device))
            self._stream.synchronize()

        return copy

    def _gather(self, blocks: Sequence[int]) -> Tensor:
        """Gather the layers of blocks, [2 L, blocks, elements of a block in one layer]."""
        where = torch.tensor(blocks, device=self._device)
        return torch.cat([half.index_select(1, where) for half in self._halves])

    def _to_host(self, gathered: Tensor) -> Tensor:
        """Copy to this thread's pinned memory at once: a copy for each layer of each block takes 100 times as long."""
        staged = self._staging(gathered.numel() * gathered.element_size())
        staged.copy_(gathered.view(torch.uint8).flatten(), non_blocking=True)
        self._stream.synchronize()
        return staged

    def _staging(self, num_bytes: int) -> Tensor:
        held: Tensor | None = getattr(self._local, "staging", None)
        if held is None or held.numel() < num_bytes:
            held = self._local.staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return held[:num_bytes]
