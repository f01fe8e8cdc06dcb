"""KV blocks in a GPU's memory: copied from another process's GPU memory by one kernel, or staged in pinned memory.

Reads and writes run on two streams of their own. Published blocks are complete, so reads do not wait for the step that
the engine runs meanwhile. Writes come after what the engine had launched when it pulled. The engine is told of blocks
only when they are in place. Checksums are computed on the device: XXH3-64 of the 64-bit folds
(`ops.fold_blocks`) of a block's rows, of which 448 bytes for 28 layers come to the host. A copy folds what it reads.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

import msgspec
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dispec import ops
from dispec.engine.transfer import cuda_ipc
from dispec.engine.transfer.handshake import Hello
from dispec.engine.transfer.kv_blocks import KVBlocks, PendingChecksums, byte_view, fold_digests, row_digests
from dispec.engine.transfer.messages import MAX_BLOCKS
from dispec.layers.types import KVCache

SLICE_BYTES = 1 << 20  # the socket sends one slice while the next ones are copied to the host
NUM_STAGING = 2  # one receives while the other is copied to the device


class DeviceBlocks(KVBlocks):
    """Blocks of a KV cache on one CUDA device. Raises ValueError if a row does not consist of 64-bit words."""

    device = "cuda"

    def __init__(self, kv_cache: KVCache) -> None:
        keys, values = (byte_view(half) for half in kv_cache)
        super().__init__(keys.shape)
        if self.layer_bytes % 8:
            raise ValueError(f"a KV block has {self.layer_bytes} bytes in a layer, must have a multiple of 8 for CUDA")
        self._device = keys.device
        self.device_index = keys.device.index or 0
        self.addresses = (keys.data_ptr(), values.data_ptr())
        self._halves = (keys.view(torch.int64), values.view(torch.int64))
        self._read_stream, self._write_stream = (torch.cuda.Stream(self._device) for _ in range(2))
        self._local = threading.local()
        # Compile both kernels now: the first transfer would wait for that.
        self.wait_before_writing()
        with torch.cuda.device(self._device):
            self._copy(self._halves, [0], [0])()
            self.checksums([0])

    def wait_before_writing(self) -> None:
        self._write_stream.wait_stream(torch.cuda.current_stream(self._device))

    def wait_until_writable(self) -> None:
        self._write_stream.synchronize()

    def num_checked_at_once(self, read_bytes: int) -> int:
        return MAX_BLOCKS  # 117 MB take 29 µs on an H200, less than a launch

    def checksums(self, blocks: Sequence[int]) -> list[bytes]:
        with self._on(writes=False):
            pending = _to_host(ops.fold_blocks(*self._halves, self._numbers(blocks)))
        return pending()

    def send_buffers(self, blocks: Sequence[int]) -> Iterator[list[memoryview]]:
        """Gather blocks in one buffer, and yield its slices as they reach this thread's pinned memory."""
        with self._on(writes=False):
            gathered = self._halves[0].new_empty(2, self.num_layers, len(blocks), self.layer_bytes // 8)
            keys, values = gathered
            ops.transfer_blocks(*self._halves, self._numbers(blocks), keys, values, self._numbers(range(len(blocks))))
            slices = gathered.flatten().view(torch.uint8).split(SLICE_BYTES)
            staged = self._staging("send", len(blocks)).split(SLICE_BYTES)
            waits = [_start_copy(*pair) for pair in zip(staged, slices, strict=True)]
        for part, wait_for_copy in zip(staged, waits, strict=True):
            wait_for_copy()
            yield [part.numpy().data]

    def receive_buffers(self, blocks: Sequence[int]) -> list[memoryview]:
        turns: Iterator[int] | None = getattr(self._local, "turns", None)
        if turns is None:
            turns = self._local.turns = itertools.cycle(range(NUM_STAGING))
            self._local.events = [None] * NUM_STAGING
        self._local.turn = turn = next(turns)
        if (event := self._local.events[turn]) is not None:
            event.synchronize()
        return [self._staging(f"receive {turn}", len(blocks)).numpy().data]

    def finish_receive(self, blocks: Sequence[int], source_device: str) -> PendingChecksums:
        turn = self._local.turn
        staged = self._staging(f"receive {turn}", len(blocks))
        with self._on(writes=True):
            received = staged.to(self._device, non_blocking=True).view(torch.int64)
            halves = received.view(2, self.num_layers, len(blocks), -1)
            folds = self._copy((halves[0], halves[1]), range(len(blocks)), blocks)
            self._local.events[turn] = self._write_stream.record_event()
        if source_device == self.device:
            return folds
        found = row_digests(staged.numpy().reshape(2 * self.num_layers, len(blocks), -1))

        def wait() -> list[bytes]:
            folds()
            return found

        return wait

    def export(self) -> bytes:
        """Return handles of the cache's memory, for a process on this host."""
        return msgspec.msgpack.encode([cuda_ipc.export(half) for half in self._halves])

    def open(self, metadata: bytes, peer: Hello) -> Callable[[Sequence[int], Sequence[int]], list[bytes]]:
        """Return a copy from a peer's blocks into own ones, which returns the checksums of what it has read.

        Raises ValueError or RuntimeError if the memory does not open.
        """
        keys, values = msgspec.msgpack.decode(metadata, type=tuple[bytes, bytes])
        num_bytes = peer.num_layers * peer.num_blocks * peer.layer_bytes

        def opened(handle: bytes) -> Int64[Tensor, "L NB W"]:
            memory = cuda_ipc.open_memory(handle, self._device, num_bytes)
            return memory.view(torch.int64).view(peer.num_layers, peer.num_blocks, -1)

        halves = opened(keys), opened(values)
        return lambda source_blocks, own_blocks: self._copy(halves, source_blocks, own_blocks)()

    @contextlib.contextmanager
    def _on(self, *, writes: bool) -> Iterator[None]:
        """Launch on the stream of reads or of writes, with this thread's current device that of the cache.

        A new thread's is GPU 0: on the way back to it CUDA would take 0.5 GB of a GPU that the process does not use.
        """
        torch.cuda.set_device(self._device)
        with torch.inference_mode(), torch.cuda.stream(self._write_stream if writes else self._read_stream):
            yield

    def _copy(
        self,
        source: tuple[Int64[Tensor, "L NS W"], Int64[Tensor, "L NS W"]],
        source_blocks: Sequence[int],
        own_blocks: Sequence[int],
    ) -> PendingChecksums:
        """Launch a copy into own blocks."""
        with self._on(writes=True):
            numbers = self._numbers([*source_blocks, *own_blocks]).view(2, -1)
            return _to_host(ops.transfer_blocks(*source, numbers[0], *self._halves, numbers[1]))

    def _numbers(self, blocks: Sequence[int]) -> Int64[Tensor, " N"]:
        numbers = pinned(8 * len(blocks)).view(torch.int64)
        return numbers.copy_(torch.tensor(blocks, dtype=torch.int64)).to(self._device, non_blocking=True)

    def _staging(self, name: str, num_blocks: int) -> UInt8[Tensor, " num_bytes"]:
        """Return this thread's pinned memory for a purpose."""
        num_bytes = num_blocks * self.block_bytes
        held: Tensor | None = getattr(self._local, name, None)
        if held is None or held.numel() < num_bytes:
            held = pinned(num_bytes)
            setattr(self._local, name, held)
        return held[:num_bytes]


def pinned(num_bytes: int) -> UInt8[Tensor, " num_bytes"]:
    """Return page-locked memory: only from and to such memory a copy runs while the host goes on."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _start_copy(target: Tensor, source: Tensor) -> Callable[[], None]:
    """Launch a copy on the current stream, and return a call, for any thread, that waits for its end."""
    target.copy_(source, non_blocking=True)
    return torch.cuda.current_stream(source.device).record_event().synchronize


def _to_host(folds: Int64[Tensor, "N rows"]) -> PendingChecksums:
    """Copy folds to the host, and return a call that waits for them and returns the checksums of the blocks."""
    received = pinned(8 * folds.numel()).view(torch.int64).view(folds.shape)
    wait_for_copy = _start_copy(received, folds)

    def wait() -> list[bytes]:
        wait_for_copy()
        return fold_digests(received)

    return wait
