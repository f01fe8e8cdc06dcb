"""KV blocks go from one engine's pages into another's, whatever carries them."""

import random

import pytest
import torch

from engine.transfer import Pulled, Released
from tests.transfer_peers import Peer, peers

CARRIERS = ["shm", "tcp", "nixl"]


def needs(transport: str) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl_cu12")


@pytest.mark.parametrize("transport", CARRIERS)
def test_pulled_pages_are_the_sources(transport: str) -> None:
    needs(transport)
    draw = random.Random(transport)
    with peers(
        Peer("source", transports=(transport,)), Peer("puller", 50, transports=(transport,), seed=1, read_bytes=20_000)
    ) as (source, puller):
        theirs, own, skip = draw.sample(range(1, 40), 17), draw.sample(range(1, 50), 12), 5
        others = [number for number in range(50) if number not in own]
        before = [puller.block(number) for number in others]
        source.transfers.publish("a", theirs, payload=b"the first token")
        puller.transfers.pull(source.transfers.ticket("a"), skip, own)
        assert puller.next_event() == Pulled("a", b"the first token")
        assert puller.transport_used() == transport
        for place, number in enumerate(own):
            assert torch.equal(puller.block(number), source.block(theirs[skip + place]))
        assert all(map(torch.equal, before, map(puller.block, others)))
        puller.transfers.release("a")
        assert source.next_event() == Released("a", was_expired=False)


@pytest.mark.parametrize("transport", CARRIERS)
def test_blocks_are_pulled_while_the_source_goes_on(transport: str) -> None:
    needs(transport)
    with peers(
        Peer("source", transports=(transport,)), Peer("puller", transports=(transport,), seed=1, read_bytes=20_000)
    ) as (source, puller):
        puller.transfers.pull(source.transfers.ticket("a"), 1, [9, 3, 4, 5])  # the source knows nothing of it yet
        source.transfers.publish("a", [20, 21, 30])
        source.transfers.publish("a", [7])
        source.transfers.publish("a", [31], payload=b"")
        assert puller.next_event() == Pulled("a", b"")
        for own, theirs in zip([9, 3, 4, 5], [21, 30, 7, 31], strict=True):
            assert torch.equal(puller.block(own), source.block(theirs))
