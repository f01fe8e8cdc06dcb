"""KV blocks between the caches of two processes, on one GPU and on two."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from dispec import LLM
from dispec.engine.scheduling.sequence import Status
from dispec.engine.transfer import cuda_ipc
from dispec.engine.transfer.interface import Pulled, PullFailed, RemoteBlocks
from tests.checkpoints import save_tiny
from tests.small_engine import greedy, make, random_prompts
from tests.transfer_peers import PATIENCE, Peer, peers

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda:0"

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

ENGINE = """
import select, sys
import msgspec
from tests.small_engine import greedy, make
engine = make(sys.argv[1], device=sys.argv[2], kv_transfer=sys.argv[3], kv_cache_memory="64MiB").engine
for number, prompt in enumerate(msgspec.json.decode(sys.stdin.readline())):
    engine.add(prompt, greedy(), publish_as=str(number))
print(msgspec.json.encode(engine.kv_connector.transfer_engine.remote_blocks("0")).decode(), flush=True)
while True:
    if not engine.has_work and sys.stdin in select.select([sys.stdin, *engine.wake_ups], [], [])[0]:
        break
    engine.work_while_idle()
    engine.step()
engine.close()
"""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Run code in a process of its own."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        text=True,
    )


class Source:
    """A source in a process of its own."""

    def __init__(self, transport: str, device: str, visible: str | None) -> None:
        environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        self.process = start(CHILD, transport, device, **environment)
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
        source.process.communicate()


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


def outputs(llm: LLM, prompts: list[list[int]], remote: RemoteBlocks | None) -> list[list[int]]:
    engine = llm.engine
    sequences = []
    for number, prompt in enumerate(prompts):
        pull = None if remote is None else msgspec.structs.replace(remote, transfer_id=str(number))
        sequences.append(engine.add(prompt, greedy(), pull=pull))
    while any(sequence.status is not Status.FINISHED for sequence in sequences):
        if not engine.has_work:
            select.select(engine.wake_ups, [], [], PATIENCE)
        engine.work_while_idle()
        engine.step()
    return [list(sequence.output_token_ids) for sequence in sequences]


@pytest.mark.parametrize(
    ("transport", "source_device"),
    [("cuda_ipc", "cuda:0"), ("tcp", "cuda:0"), pytest.param("cuda_ipc", "cuda:1", marks=needs_two)],
)
def test_prompts_computed_by_another_process_are_continued(tmp_path: Path, transport: str, source_device: str) -> None:
    save_tiny(tmp_path, "qwen3", head_dim=64)  # the kernels are not tuned for smaller heads
    prompts = random_prompts(12)
    with make(tmp_path, device=DEVICE, kv_cache_memory="64MiB") as plain:
        expected = outputs(plain, prompts, None)
    child = start(ENGINE, str(tmp_path), source_device, transport)
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(prompts) + "\n")
        child.stdin.flush()
        remote = msgspec.json.decode(child.stdout.readline(), type=RemoteBlocks)
        with make(tmp_path, device=DEVICE, kv_transfer=transport, kv_cache_memory="64MiB") as llm:
            assert outputs(llm, prompts, remote) == expected
            assert llm.engine.kv_connector.totals.num_received_prompts == len(prompts)
    finally:
        child.kill()
        child.communicate()
