"""Transfers between caches of a GPU, with streams that are recorded and memory of the CPU in place of the device's."""

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
import xxhash

from dispec import ops
from dispec.engine.transfer import cuda_ipc, device_blocks, transports
from dispec.engine.transfer.device_blocks import DeviceBlocks
from dispec.engine.transfer.interface import Pulled, PullFailed, Released
from dispec.engine.transfer.kv_blocks import HostBlocks, KVBlocks
from dispec.engine.transfer.shared_memory import SharedMemory
from dispec.layers.types import KVCache
from dispec.ops import reference
from tests.transfer_peers import PATIENCE, Peer, peers


class Device:
    """Streams whose operations are recorded in the order of their launch, by name of the stream."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, str]] = []
        self.engine = Stream(self, "engine")
        self.names = itertools.cycle(("read", "write"))  # in the order in which `DeviceBlocks` makes them
        self.current = threading.local()

    @contextlib.contextmanager
    def use(self, stream: "Stream") -> Iterator[None]:
        before, self.current.stream = self.stream(), stream
        try:
            yield
        finally:
            self.current.stream = before

    def stream(self) -> "Stream":
        return getattr(self.current, "stream", self.engine)

    def launch(self, what: str) -> None:
        self.launched.append((self.stream().name, what))


class Stream:
    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name = device, name

    def wait_stream(self, other: "Stream") -> None:
        self.device.launched.append((self.name, f"wait for {other.name}"))

    def record_event(self) -> "Event":
        self.device.launched.append((self.name, "event"))
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.stream.device.launched.append((self.stream.name, "synchronize"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Let caches without shared memory be those of a device, and IPC handles lead to tensors of this process."""
    made = Device()
    exported: list[torch.Tensor] = []

    def export(tensor: torch.Tensor) -> bytes:
        exported.append(tensor)
        return bytes([len(exported) - 1])

    def open_memory(handle: bytes, device: torch.device, num_bytes: int) -> torch.Tensor:
        return exported[handle[0]].view(torch.uint8).flatten()[:num_bytes]

    def blocks_of(kv_cache: KVCache, shared: SharedMemory | None) -> KVBlocks:
        return DeviceBlocks(kv_cache) if shared is None else HostBlocks.of_cache(kv_cache, shared)

    def recorded(name: str) -> None:
        function = getattr(ops, name)

        def call(*arguments: torch.Tensor) -> torch.Tensor:
            made.launch(name)
            return function(*arguments)

        monkeypatch.setattr(device_blocks.ops, name, call)

    for name in ("fold_blocks", "transfer_blocks"):
        recorded(name)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(made, next(made.names)))
    monkeypatch.setattr(torch.cuda, "stream", made.use)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: made.stream())
    monkeypatch.setattr(device_blocks, "pinned", lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8))
    monkeypatch.setattr(cuda_ipc, "export", export)
    monkeypatch.setattr(cuda_ipc, "open_memory", open_memory)
    monkeypatch.setattr(transports, "blocks_of", blocks_of)
    return made


def peer(name: str, transport: str, *, on_device: bool = True, seed: int = 0, **options: object) -> Peer:
    return Peer(name, 40 + seed, transports=(transport,), is_shared=not on_device, seed=seed, **options)


@pytest.mark.parametrize(
    ("transport", "sides"),
    [("cuda_ipc", (True, True)), ("tcp", (True, True)), ("tcp", (True, False)), ("tcp", (False, True))],
)
def test_pulled_blocks_equal_the_sources(device: Device, transport: str, sides: tuple[bool, bool]) -> None:
    with peers(
        peer("source", transport, on_device=sides[0], read_bytes=10_000),
        peer("puller", transport, on_device=sides[1], seed=1, read_bytes=10_000),
    ) as (source, puller):
        published, own = [9, 3, 38, 4, 5, 6, 20, 11, 2, 7], [40, 8, 9, 10, 1, 30, 12, 13, 14]
        others = [number for number in range(41) if number not in own]
        before = [puller.block(number) for number in others]
        source.engine.publish("a", published[:6])
        puller.engine.pull(source.engine.remote_blocks("a"), 1, own)
        source.engine.publish("a", published[6:], payload=b"the first token")
        assert puller.next_event() == Pulled("a", b"the first token")
        assert puller.transport_used() == transport
        for theirs, number in zip(published[1:], own, strict=True):
            assert torch.equal(puller.block(number), source.block(theirs))
        assert all(map(torch.equal, before, map(puller.block, others)))
        puller.engine.release("a")
        assert source.next_event() == Released("a", was_expired=False)


@pytest.mark.parametrize(("transport", "on_device"), [("cuda_ipc", True), ("tcp", True), ("tcp", False)])
def test_bytes_that_change_after_they_were_published_are_caught(
    device: Device, transport: str, on_device: bool
) -> None:
    with peers(
        peer("source", transport), peer("puller", transport, on_device=on_device, seed=1), peer("third", "tcp", seed=2)
    ) as (source, puller, third):
        source.engine.publish("a", [5, 6, 7], payload=b"")
        source.engine.publish("after", [0], payload=b"")
        if transport == "tcp":  # checksums are computed in order: once the second transfer's are, so are these
            third.engine.pull(source.engine.remote_blocks("after"), 0, [1])
            third.next_event()
        else:
            puller.engine.pull(source.engine.remote_blocks("after"), 0, [9])
            puller.next_event()
        source.kv_cache.values[2, 6].view(torch.uint8).view(-1)[-1] ^= 1
        puller.engine.pull(source.engine.remote_blocks("a"), 0, [1, 2, 3])
        event = puller.next_event()
        assert isinstance(event, PullFailed)
        assert "the checksum of block 1 is wrong" in event.reason


def test_one_launch_copies_blocks_by_ipc_after_what_the_puller_launched(device: Device) -> None:
    with peers(peer("source", "cuda_ipc"), peer("puller", "cuda_ipc", seed=1)) as (source, puller):
        device.launched.clear()
        source.engine.publish("a", list(range(30)), payload=b"")
        puller.engine.pull(source.engine.remote_blocks("a"), 0, list(range(30)))
        assert puller.next_event() == Pulled("a", b"")
        reads = [what for stream, what in device.launched if stream == "read"]
        writes = [what for stream, what in device.launched if stream == "write"]
        assert reads == ["fold_blocks", "event", "synchronize"]
        assert writes == ["wait for engine", "transfer_blocks", "event", "synchronize"]
        assert not [what for stream, what in device.launched if stream == "engine"]


def test_blocks_over_tcp_are_sent_in_slices_and_written_before_they_are_reported(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_blocks, "SLICE_BYTES", 10_000)
    with peers(peer("source", "tcp"), peer("puller", "tcp", seed=1)) as (source, puller):
        blocks = source.engine._blocks
        assert isinstance(blocks, DeviceBlocks)
        numbers = [7, 8, 3, 20]
        device.launched.clear()
        parts = [bytes(buffer) for part in blocks.send_buffers(numbers) for buffer in part]
        assert [len(part) for part in parts] == [10_000, 4 * blocks.block_bytes - 10_000]
        assert b"".join(parts) == b"".join(
            half[:, numbers].view(torch.uint8).numpy().tobytes() for half in source.kv_cache
        )
        names = [what for _, what in device.launched]
        assert names == ["transfer_blocks", "event", "event", "synchronize", "synchronize"]
        own = puller.engine._blocks
        for _ in range(3):  # so that each staging buffer is used again
            device.launched.clear()
            (buffer,) = own.receive_buffers(numbers)
            memoryview(buffer).cast("B")[:] = b"".join(parts)
            pending = own.finish_receive(numbers, "cuda")
            assert ("write", "synchronize") not in device.launched[
                device.launched.index(("write", "transfer_blocks")) :
            ]
            assert pending() == blocks.checksums(numbers)
            assert device.launched.count(("write", "synchronize")) >= 1
        assert torch.equal(puller.block(20), source.block(20))


def test_checksums_are_those_of_the_folds(device: Device) -> None:
    with peers(peer("source", "tcp")) as (source,):
        keys, values = (half.flatten(2).view(torch.int64) for half in source.kv_cache)
        folds = reference.fold_blocks(keys, values, torch.tensor([3, 1]))
        assert source.engine._blocks.checksums([3, 1]) == [
            xxhash.xxh3_64_digest(row.numpy().tobytes()) for row in folds
        ]


def test_memory_that_does_not_open_leaves_tcp_and_one_warning(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handle: bytes, device: torch.device, num_bytes: int) -> torch.Tensor:
        raise RuntimeError("CUDA error: peer access is not supported between these two devices")

    monkeypatch.setattr(cuda_ipc, "open_memory", refuse)
    allowed = ("cuda_ipc", "tcp")
    with peers(
        Peer("source", transports=allowed, is_shared=False), Peer("puller", transports=allowed, is_shared=False, seed=1)
    ) as (source, puller):
        for name in ("a", "b"):
            source.engine.publish(name, [5, 6], payload=b"")
            puller.engine.pull(source.engine.remote_blocks(name), 0, [1, 2])
            assert puller.next_event() == Pulled(name, b"")
            assert torch.equal(puller.block(2), source.block(6))
            puller.engine.release(name)
        assert puller.transport_used() == "tcp"
        (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert "cuda_ipc cannot be used: CUDA error: peer access is not supported" in warning


def test_the_memory_of_a_source_that_ends_is_unmapped(device: Device) -> None:
    with peers(peer("puller", "cuda_ipc", seed=1)) as (puller,):
        with peers(peer("source", "cuda_ipc")) as (source,):
            source.engine.publish("a", [5], payload=b"")
            puller.engine.pull(source.engine.remote_blocks("a"), 0, [1])
            assert puller.next_event() == Pulled("a", b"")
            source.engine.publish("unfinished", [6])
            puller.engine.pull(source.engine.remote_blocks("unfinished"), 0, [2, 3])
            (client,) = puller.engine._clients.values()
            assert client._copy is not None
            mapped = weakref.ref(client._copy)
        assert isinstance(puller.next_event(), PullFailed)
        client.join()
        assert mapped() is None


def test_a_cancelled_pull_by_ipc_writes_nothing_more(device: Device) -> None:
    with peers(peer("source", "cuda_ipc"), peer("puller", "cuda_ipc", seed=1)) as (source, puller):
        source.engine.publish("a", [5])
        source.engine.publish("b", [7], payload=b"")
        puller.engine.pull(source.engine.remote_blocks("a"), 0, [1, 2])
        puller.engine.pull(source.engine.remote_blocks("b"), 0, [3])
        assert puller.next_event() == Pulled("b", b"")  # so the source has the puller's query
        puller.engine.release("a")
        assert puller.next_event() == PullFailed("a", "it was cancelled")
        before = puller.block(2)
        assert source.next_event() == Released("a", was_expired=False)
        source.engine.publish("a", [6], payload=b"")
        source.engine.publish("c", [8], payload=b"")
        puller.engine.pull(source.engine.remote_blocks("c"), 0, [4])
        assert puller.next_event() == Pulled("c", b"")
        assert torch.equal(puller.block(2), before)


def test_blocks_that_are_reused_after_the_lease_are_not_taken(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The puller stands still, as a stopped process, until the lease has run out, and reads the mapped memory then."""
    resume = threading.Event()
    with peers(
        peer("source", "cuda_ipc", lease_seconds=0.2, stall_seconds=PATIENCE),
        peer("puller", "cuda_ipc", seed=1, stall_seconds=PATIENCE),
    ) as (source, puller):
        own = puller.engine._blocks
        assert isinstance(own, DeviceBlocks)
        copy = own._copy

        def late(*arguments: object) -> object:
            assert resume.wait(PATIENCE)
            return copy(*arguments)

        monkeypatch.setattr(own, "_copy", late)
        monkeypatch.setattr(puller.engine._receiver, "tick", lambda now: [])  # nor does it renew the lease
        source.engine.publish("a", [5, 6], payload=b"")
        puller.engine.pull(source.engine.remote_blocks("a"), 0, [1, 2])
        assert source.next_event() == Released("a", was_expired=True)
        source.memory.fill_(7)  # the blocks are another request's now
        resume.set()
        event = puller.next_event()
        assert isinstance(event, PullFailed)
        assert "checksum of block 0 is wrong" in event.reason or "lease" in event.reason


def test_a_block_that_is_not_of_whole_words_is_refused(device: Device) -> None:
    cache = KVCache(torch.zeros(2, 3, 1, 5, 1), torch.zeros(2, 3, 1, 1, 5))
    with pytest.raises(ValueError, match="20 bytes in a layer, must have a multiple of 8"):
        DeviceBlocks(cache)
