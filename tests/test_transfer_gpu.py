"""KV blocks between two processes' caches on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from dispec.engine.transfer.interface import Pulled, RemoteBlocks
from tests.transfer_peers import Peer, peers

ROOT = Path(__file__).resolve().parent.parent

CHILD = """
import sys
import msgspec
from tests.transfer_peers import Peer
source = Peer("source", 40, device="cuda", transports=(sys.argv[1],))
ready = source.memory.clone()
source.memory.zero_()
for _ in range(200):  # the cache is filled only after all this: publish must wait for it
    source.memory.add_(1)
source.memory.copy_(ready)
source.engine.publish("a", [5, 31, 7])
source.engine.publish("a", [8], payload=b"done")
print(msgspec.json.encode(source.engine.remote_blocks("a")).decode(), flush=True)
print(source.next_event(), flush=True)
source.engine.close()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("transport", "device"), [("cuda_ipc", "cuda"), ("tcp", "cuda"), ("tcp", "cpu")])
def test_pulled_blocks_on_a_gpu_equal_the_sources(transport: str, device: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, transport],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        text=True,
    )
    try:
        assert child.stdout is not None
        remote_blocks = msgspec.json.decode(child.stdout.readline(), type=RemoteBlocks)
        same = Peer("reference", 40)  # the same noise as the source's
        puller = Peer("puller", 40, device=device, transports=(transport,), seed=1)
        with peers(puller, same):
            others = [number for number in range(40) if number not in (20, 3, 4)]
            before = [puller.block(number) for number in others]
            puller.engine.pull(remote_blocks, 1, [20, 3, 4])
            assert puller.next_event() == Pulled("a", b"done")
            assert puller.transport_used() == transport
            for own, theirs in zip((20, 3, 4), (31, 7, 8), strict=True):
                assert torch.equal(puller.block(own), same.block(theirs))
            assert all(map(torch.equal, before, map(puller.block, others)))
            puller.engine.release("a")
            assert "was_expired=False" in child.stdout.readline()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
