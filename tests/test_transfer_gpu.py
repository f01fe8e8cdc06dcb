"""KV blocks between the caches of two processes, on one GPU and on two."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from dispec.engine.transfer import cuda_ipc
from dispec.engine.transfer.interface import Pulled, PullFailed, RemoteBlocks
from tests.transfer_peers import Peer, peers

ROOT = Path(__file__).resolve().parent.parent

CHILD = """
import signal, sys
import msgspec
from tests.transfer_peers import Peer
source = Peer("source", 40, device=sys.argv[2], transports=(sys.argv[1],))
source.engine.publish("a", [5, 31, 7])
source.engine.publish("a", [8], payload=b"done")
source.engine.publish("unfinished", [9])
remote_blocks = [source.engine.remote_blocks(name) for name in ("a", "unfinished")]
handle = source.engine._blocks.export() if "cuda" in sys.argv[2] else b""
print(msgspec.json.encode((*remote_blocks, handle)).decode(), flush=True)
print(source.next_event(), flush=True)
signal.pause()
"""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


class Source:
    """A source in a process of its own."""

    def __init__(self, transport: str, device: str, visible: str | None) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible
        command = [sys.executable, "-c", CHILD, transport, device]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment, text=True)
        self.complete, self.unfinished, self.handle = msgspec.json.decode(
            self.next_line(), type=tuple[RemoteBlocks, RemoteBlocks, bytes]
        )

    def next_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@contextlib.contextmanager
def source_process(transport: str, device: str = "cuda", visible: str | None = None) -> Iterator[Source]:
    source = Source(transport, device, visible)
    try:
        yield source
    finally:
        source.process.kill()
        source.process.wait()
        assert source.process.stdout is not None
        source.process.stdout.close()


@pytest.mark.parametrize(
    ("transport", "source_device", "visible", "device"),
    [
        ("cuda_ipc", "cuda", None, "cuda"),
        ("tcp", "cuda", None, "cuda"),
        ("tcp", "cuda", None, "cpu"),
        ("tcp", "cpu", None, "cuda"),
        pytest.param("cuda_ipc", "cuda:1", None, "cuda:0", marks=needs_two),
        pytest.param("cuda_ipc", "cuda:0", "1", "cuda:0", marks=needs_two),  # by another number in each process
        pytest.param("cuda_ipc", "cuda:0", None, "cuda:1", marks=needs_two),
        pytest.param("tcp", "cuda:1", None, "cuda:0", marks=needs_two),
    ],
)
def test_pulled_blocks_on_a_gpu_equal_the_sources(
    transport: str, source_device: str, visible: str | None, device: str
) -> None:
    with source_process(transport, source_device, visible) as source:
        same = Peer("reference", 40)  # the same noise as the source's
        puller = Peer("puller", 41, device=device, transports=(transport,), seed=1)
        with peers(puller, same):
            others = [number for number in range(41) if number not in (20, 3, 4)]
            before = [puller.block(number) for number in others]
            noise = puller.memory.clone()
            for _ in range(200):  # a step of the engine that still writes to the blocks: the pull must wait for it
                puller.memory.add_(1)
            puller.memory.copy_(noise)
            puller.engine.pull(source.complete, 1, [20, 3, 4])
            assert puller.next_event() == Pulled("a", b"done")
            assert puller.transport_used() == transport
            for own, theirs in zip((20, 3, 4), (31, 7, 8), strict=True):
                assert torch.equal(puller.block(own), same.block(theirs))
            assert all(map(torch.equal, before, map(puller.block, others)))
            puller.engine.release("a")
            assert "was_expired=False" in source.next_line()


@pytest.mark.parametrize("source_device", ["cuda:0", pytest.param("cuda:1", marks=needs_two)])
def test_a_killed_source_fails_its_pulls_and_leaves_the_device_usable(source_device: str) -> None:
    with source_process("cuda_ipc", source_device) as source:
        same = Peer("reference", 40)
        puller = Peer("puller", 40, device="cuda:0", transports=("cuda_ipc",), seed=1)
        with peers(puller, same):
            puller.engine.pull(source.complete, 0, [20, 3, 4, 10])
            assert puller.next_event() == Pulled("a", b"done")
            puller.engine.pull(source.unfinished, 0, [11, 12])
            source.process.send_signal(signal.SIGKILL)
            source.process.wait()
            event = puller.next_event()
            assert isinstance(event, PullFailed)
            assert torch.equal(puller.block(20), same.block(5))
            keys, _ = msgspec.msgpack.decode(source.handle, type=tuple[bytes, bytes])
            with pytest.raises(RuntimeError):
                cuda_ipc.open_memory(keys, torch.device("cuda", 0), 4096)
            assert int(torch.ones(1000, device="cuda").sum()) == 1000
