"""KV blocks move from one engine's cache into another's, by each transport."""

import random

import pytest
import torch
import xxhash

from dispec.engine.options import EngineOptions
from dispec.engine.transfer.interface import Pulled, PullFailed, Released
from dispec.engine.transfer.kv_blocks import HostBlocks
from dispec.layers.types import KVCache
from tests.transfer_peers import Peer, peers

TRANSPORTS = ["shm", "tcp", "nixl"]


def needs(transport: str) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl_cu12")


@pytest.mark.smoke
def test_the_bytes_of_blocks_are_their_keys_then_their_values_layer_by_layer() -> None:
    with peers(Peer("source")) as (source,):
        blocks = [7, 8, 3]
        sent = b"".join(buffer for part in source.engine._blocks.send_buffers(blocks) for buffer in part)
        keys, values = (half[:, blocks].view(torch.uint8).numpy().tobytes() for half in source.kv_cache)
        assert sent == keys + values
        expected = [xxhash.xxh3_64_digest(source.block(block).numpy().tobytes()) for block in blocks]
        assert source.engine._blocks.checksums(blocks) == expected


def test_a_cache_that_is_not_in_the_shared_memory_is_refused() -> None:
    with peers(Peer("source")) as (source,):
        swapped = KVCache(source.kv_cache.values, source.kv_cache.keys)
        with pytest.raises(ValueError, match="not the keys and then the values of the shared memory"):
            HostBlocks.of_cache(swapped, source.shared)


@pytest.mark.smoke
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_pulled_blocks_equal_the_sources(transport: str) -> None:
    needs(transport)
    draw = random.Random(transport)
    with peers(
        Peer("source", transports=(transport,)), Peer("puller", 50, transports=(transport,), seed=1, read_bytes=20_000)
    ) as (source, puller):
        published, own, skip = draw.sample(range(1, 40), 17), draw.sample(range(1, 50), 12), 5
        others = [number for number in range(50) if number not in own]
        before = [puller.block(number) for number in others]
        source.engine.publish("a", published, payload=b"the first token")
        puller.engine.pull(source.engine.remote_blocks("a"), skip, own)
        assert puller.next_event() == Pulled("a", b"the first token")
        assert puller.transport_used() == transport
        for index, number in enumerate(own):
            assert torch.equal(puller.block(number), source.block(published[skip + index]))
        assert all(map(torch.equal, before, map(puller.block, others)))
        puller.engine.release("a")
        assert source.next_event() == Released("a", was_expired=False)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_blocks_are_pulled_while_the_source_publishes(transport: str) -> None:
    needs(transport)
    with peers(
        Peer("source", transports=(transport,)), Peer("puller", transports=(transport,), seed=1, read_bytes=20_000)
    ) as (source, puller):
        puller.engine.pull(source.engine.remote_blocks("a"), 1, [9, 3, 4, 5])  # before the source knows the transfer
        source.engine.publish("a", [20, 21, 30])
        source.engine.publish("a", [7])
        source.engine.publish("a", [31], payload=b"")
        assert puller.next_event() == Pulled("a", b"")
        for own, theirs in zip([9, 3, 4, 5], [21, 30, 7, 31], strict=True):
            assert torch.equal(puller.block(own), source.block(theirs))


@pytest.mark.parametrize(
    ("is_shared", "transport"), [((True, True), "shm"), ((True, False), "tcp"), ((False, True), "tcp")]
)
def test_shared_memory_is_preferred_if_both_have_it(is_shared: tuple[bool, bool], transport: str) -> None:
    allowed = ("shm", "tcp")
    first = Peer("source", is_shared=is_shared[0], transports=allowed)
    with peers(first, Peer("puller", is_shared=is_shared[1], transports=allowed, seed=1)) as (source, puller):
        source.engine.publish("a", [3, 5], payload=b"")
        puller.engine.pull(source.engine.remote_blocks("a"), 0, [4, 6])
        assert puller.next_event() == Pulled("a", b"")
        assert puller.transport_used() == transport
        assert torch.equal(puller.block(6), source.block(5))


def test_many_transfers_both_ways_at_once() -> None:
    draw = random.Random(0)
    options = {"transports": ("tcp",), "read_bytes": 4096}
    with peers(Peer("one", 200, **options), Peer("other", 200, seed=1, **options)) as made:
        expected = {}
        for number, (source, puller) in enumerate([made, made[::-1]]):
            order = draw.sample(range(1, 100), 90)
            own = draw.sample(range(100, 200), 90)
            for at in range(0, 90, 3):
                name = f"{number}-{at}"
                expected[name] = (puller, own[at : at + 3], [source.block(block) for block in order[at : at + 3]])
                source.engine.publish(name, order[at : at + 2])
                puller.engine.pull(source.engine.remote_blocks(name), 0, own[at : at + 3])
                source.engine.publish(name, order[at + 2 : at + 3], payload=name.encode())
        for peer in made:
            for name, event in peer.events(30).items():
                assert event == Pulled(name, name.encode())
        for name, (puller, own, wanted) in expected.items():
            assert all(map(torch.equal, map(puller.block, own), wanted))
            puller.engine.release(name)
        for peer in made:
            assert {type(event) for event in peer.events(30).values()} == {Released}


def test_a_pull_without_blocks_brings_the_payload() -> None:
    with peers(Peer("source"), Peer("puller")) as (source, puller):
        source.engine.publish("a", [1, 2])
        puller.engine.pull(source.engine.remote_blocks("a"), 2, [])
        source.engine.publish("a", [], payload=bytes(1 << 20))
        assert puller.next_event() == Pulled("a", bytes(1 << 20))


def test_a_withdrawn_transfer_fails_with_its_reason() -> None:
    with peers(Peer("source"), Peer("puller")) as (source, puller):
        puller.engine.pull(source.engine.remote_blocks("a"), 0, [1, 2])
        source.engine.publish("a", [5])
        source.engine.withdraw("a", "the client left")
        event = puller.next_event()
        assert isinstance(event, PullFailed)
        assert "the client left" in event.reason
        assert source.next_event() == Released("a", was_expired=False)


def test_a_transfer_withdrawn_before_its_first_block_fails() -> None:
    with peers(Peer("source"), Peer("puller")) as (source, puller):
        puller.engine.pull(source.engine.remote_blocks("a"), 0, [1, 2])
        source.engine.withdraw("a", "the prompt is too long")
        event = puller.next_event()
        assert isinstance(event, PullFailed)
        assert "the prompt is too long" in event.reason
        assert source.next_event() == Released("a", was_expired=False)


def test_a_cancelled_pull_ends_on_both_sides() -> None:
    with peers(Peer("source"), Peer("puller")) as (source, puller):
        source.engine.publish("a", [5])
        puller.engine.pull(source.engine.remote_blocks("a"), 0, [1, 2])
        puller.engine.pull(source.engine.remote_blocks("b"), 0, [3])
        source.engine.publish("b", [6], payload=b"")
        assert puller.next_event() == Pulled("b", b"")  # so the source has the puller's query
        puller.engine.release("a")
        assert puller.next_event() == PullFailed("a", "it was cancelled")
        assert source.next_event() == Released("a", was_expired=False)


def test_a_pull_of_more_blocks_than_published_fails() -> None:
    with peers(Peer("source"), Peer("puller")) as (source, puller):
        source.engine.publish("a", [5, 6], payload=b"")
        puller.engine.pull(source.engine.remote_blocks("a"), 1, [1, 2])
        event = puller.next_event()
        assert isinstance(event, PullFailed)
        assert "has 2 blocks, 3 were expected" in event.reason


def test_a_secret_is_needed_where_other_machines_can_connect() -> None:
    with pytest.raises(ValueError, match=r"kv_transfer_host is '192.0.2.1', which others can reach"):
        EngineOptions(kv_transfer="tcp", kv_transfer_host="192.0.2.1")
    with pytest.raises(ValueError, match="kv_transfer_secret must have at least 16 bytes"):
        EngineOptions(kv_transfer="tcp", kv_transfer_secret="abc")


def test_invalid_arguments_are_refused() -> None:
    with peers(Peer("a", 10)) as (peer,):
        for blocks in ([10], [-1]):
            with pytest.raises(ValueError, match="must be 0 to 9"):
                peer.engine.publish("a", blocks)
            with pytest.raises(ValueError, match="must be 0 to 9"):
                peer.engine.pull(peer.engine.remote_blocks("a"), 0, blocks)
        with pytest.raises(ValueError, match="blocks has a block twice"):
            peer.engine.pull(peer.engine.remote_blocks("a"), 0, [1, 1])
        with pytest.raises(ValueError, match=r"payload has .* bytes, must have at most"):
            peer.engine.publish("a", [1], payload=bytes((16 << 20) + 1))
        peer.engine.publish("a", [1], payload=b"")
        with pytest.raises(ValueError, match="complete"):
            peer.engine.publish("a", [1])
        peer.engine.pull(peer.engine.remote_blocks("b"), 0, [1])
        with pytest.raises(ValueError, match="being pulled already"):
            peer.engine.pull(peer.engine.remote_blocks("b"), 0, [2])
