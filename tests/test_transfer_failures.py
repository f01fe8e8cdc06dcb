"""KV transfer with peers that lie, break, vanish, or are nobody's."""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
import torch

from dispec.engine.transfer import Pulled, PullFailed, Released, RemoteBlocks
from dispec.engine.transfer.handshake import Hello, Refused, greet
from dispec.engine.transfer.wire import Connection
from tests.transfer_peers import FINGERPRINT, PATIENCE, SECRET, Peer, peers

ROOT = Path(__file__).resolve().parent.parent

CHILD = """
import json, signal, sys
import msgspec
from dispec.engine.transfer import RemoteBlocks
from tests.transfer_peers import Peer
peer = Peer("child", 400)
held, unfinished = (msgspec.json.decode(argument, type=RemoteBlocks) for argument in sys.argv[1:])
peer.transfers.pull(held, 0, [1, 2])
peer.next_event()
peer.transfers.pull(unfinished, 0, [3, 4])
peer.transfers.publish("of the child", list(range(10, 390)))
print(msgspec.json.encode(peer.transfers.remote_blocks("of the child")).decode(), flush=True)
signal.pause()
"""


def failure(peer: Peer) -> str:
    event = peer.next_event()
    assert isinstance(event, PullFailed), event
    return event.reason


def settled(source: Peer, name: str, blocks: list[int], puller: Peer, own: int) -> None:
    """Publish, and wait until all checksums are computed: a later transfer's are, and they come in order."""
    source.transfers.publish(name, blocks, payload=b"")
    source.transfers.publish(f"after {name}", [0], payload=b"")
    puller.transfers.pull(source.transfers.remote_blocks(f"after {name}"), 0, [own])
    assert isinstance(puller.next_event(), Pulled)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"secret": b"known to nobody else at all"}, "does not have our secret"),
        ({"secret": None}, "does not have our secret"),
        ({"fingerprint": "another"}, "fingerprint differs: the source has a model, the puller another"),
        ({"num_layers": 2}, "number of layers differs: the source has 3, the puller 2"),
    ],
)
def test_peers_that_do_not_fit_are_refused(what: dict[str, object], said: str) -> None:
    with peers(Peer("source"), Peer("puller", **what)) as (source, puller):
        puller.transfers.pull(source.transfers.remote_blocks("a"), 0, [1])
        assert said in failure(puller)


def test_another_engine_at_the_address_is_not_pulled_from() -> None:
    with peers(Peer("restarted"), Peer("puller")) as (source, puller):
        puller.transfers.pull(RemoteBlocks("first", "a", *source.transfers.address), 0, [1])
        assert "was it restarted?" in failure(puller)


def test_nobody_at_the_address() -> None:
    with peers(Peer("puller")) as (puller,), socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
        unused.close()
        puller.transfers.pull(RemoteBlocks("source", "a", "127.0.0.1", port), 0, [1])
        assert "refused" in failure(puller)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 513) + bytes(513),
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", 0),
        struct.pack(">I", 4) + b"\xc1\xc1\xc1\xc1",
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    ],
)
def test_what_strangers_send_ends_their_connection_and_nothing_else(data: bytes) -> None:
    with peers(Peer("source"), Peer("puller", seed=1)) as (source, puller):
        with socket.create_connection(source.transfers.address, PATIENCE) as stranger:
            stranger.sendall(data)
            assert ended(stranger)
        source.transfers.publish("a", [1], payload=b"")
        puller.transfers.pull(source.transfers.remote_blocks("a"), 0, [2])
        assert puller.next_event() == Pulled("a", b"")


def ended(sock: socket.socket) -> bool:
    """Whether the other side closes; it may say why first."""
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(4096):
            pass
    return True


def hello(source: Peer) -> Hello:
    """Of a peer whose pages are like the source's."""
    pages = source.transfers._pages
    return Hello("peer", FINGERPRINT, pages.num_layers, 40, pages.layer_bytes, "cpu", ["tcp"], "", 0)


def authenticated(source: Peer) -> Connection:
    connection = Connection(socket.create_connection(source.transfers.address, PATIENCE), PATIENCE)
    greet(connection, SECRET, hello(source))
    return connection


def test_a_peer_of_another_version_is_refused_by_its_version() -> None:
    with peers(Peer("source")) as (source,):
        connection = Connection(socket.create_connection(source.transfers.address, PATIENCE), PATIENCE)
        other = msgspec.structs.replace(hello(source), version=1, layer_bytes=0)  # fields that this version refuses
        with contextlib.closing(connection), pytest.raises(Refused, match="protocol version is 1, must be 2"):
            greet(connection, SECRET, other)


@pytest.mark.parametrize("data", [struct.pack(">I", (256 << 10) + 1), struct.pack(">I", 3) + b"\x81\x01\x02"])
def test_a_peer_that_talks_nonsense_is_dropped(data: bytes) -> None:
    with peers(Peer("source")) as (source,):
        connection = authenticated(source)
        connection.socket.sendall(data)
        assert ended(connection.socket)
        connection.close()


def test_a_challenge_reflected_is_no_answer() -> None:
    with peers(Peer("source")) as (source,):
        connection = Connection(socket.create_connection(source.transfers.address, PATIENCE), PATIENCE)
        decode = msgspec.msgpack.decode
        connection.send({"type": "dispec-transfer", "nonce": bytes(32)})
        challenge = connection.receive(decode)
        connection.send({"type": "_Answer", "proof": challenge["proof"], "hello": b""})
        assert connection.receive(decode)["reason"] == "the puller does not have our secret"
        assert ended(connection.socket)
        connection.close()


def test_those_who_never_answer_hold_a_bounded_number_of_places() -> None:
    with peers(Peer("source", max_handshakes=2, connect_seconds=PATIENCE)) as (source,):
        idle = [socket.create_connection(source.transfers.address, PATIENCE) for _ in range(4)]
        assert all(map(ended, idle[2:]))
        assert select.select(idle[:2], [], [], 0)[0] == []
        for sock in idle:
            sock.close()


def test_those_who_never_answer_hold_their_places_for_a_bounded_time() -> None:
    with peers(Peer("source", connect_seconds=0.3), Peer("puller")) as (source, puller):
        with socket.create_connection(source.transfers.address, PATIENCE) as idle:
            idle.sendall(struct.pack(">I", 400))  # and not a byte of what is announced
            assert ended(idle)
        source.transfers.publish("a", [1], payload=b"")
        puller.transfers.pull(source.transfers.remote_blocks("a"), 0, [2])
        assert puller.next_event() == Pulled("a", b"")


@pytest.mark.parametrize("transport", ["shm", "nixl"])
def test_bytes_that_change_after_they_were_published_are_caught(transport: str) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl_cu12")
    allowed = (transport,)
    with peers(Peer("source", transports=allowed), Peer("puller", transports=allowed, seed=1)) as (source, puller):
        settled(source, "a", [5, 6, 7], puller, 9)
        source.kv_cache.values[2, 6].view(torch.uint8).view(-1)[-1] ^= 1
        puller.transfers.pull(source.transfers.remote_blocks("a"), 0, [1, 2, 3])
        assert "the checksum of place 1 is wrong" in failure(puller)
        assert source.events(1).keys() == {"a"}  # which the puller does not want any more


class Proxy:
    """Between a puller and its source. What the source says passes through `change`, with its place in the stream."""

    def __init__(self, address: tuple[str, int], flip: int | None = None, stop: int | None = None) -> None:
        self.seen = bytearray()
        self._flip, self._stop = flip, stop
        self._target = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._run, daemon=True)]
        self._threads[0].start()

    def _run(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(self._target)
        other = threading.Thread(target=self._forward, args=(near, far, False), daemon=True)
        other.start()
        self._forward(far, near, True)
        other.join()
        self._listener.close()

    def _forward(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        at = 0
        try:
            while data := bytearray(source.recv(1 << 16)):
                self.seen += data
                if is_answer and self._flip is not None and at <= self._flip < at + len(data):
                    data[self._flip - at] ^= 1
                at += len(data)
                if is_answer and self._stop is not None and at > self._stop:
                    break
                target.sendall(data)
        except OSError:
            pass
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def test_a_bit_that_flips_on_the_way_is_caught_and_the_secret_is_never_there() -> None:
    options = {"transports": ("tcp",)}
    with peers(Peer("source", **options), Peer("puller", seed=1, **options)) as (source, puller):
        settled(source, "a", list(range(1, 21)), puller, 30)
        proxy = Proxy(source.transfers.address, flip=30_000)
        puller.transfers.pull(RemoteBlocks("source", "a", "127.0.0.1", proxy.port), 0, list(range(5, 25)))
        assert "checksum" in failure(puller)
        assert len(proxy.seen) > 20 * 3072
        assert SECRET not in proxy.seen


def test_a_connection_that_breaks_in_the_middle_of_a_read_fails_the_pull() -> None:
    options = {"transports": ("tcp",)}
    with peers(Peer("source", **options), Peer("puller", seed=1, **options)) as (source, puller):
        settled(source, "a", list(range(1, 21)), puller, 30)
        proxy = Proxy(source.transfers.address, stop=30_000)
        puller.transfers.pull(RemoteBlocks("source", "a", "127.0.0.1", proxy.port), 0, list(range(5, 25)))
        assert "the peer closed the connection" in failure(puller)


def test_a_source_that_says_nothing_is_given_up() -> None:
    with peers(Peer("puller", connect_seconds=0.3)) as (puller,), socket.create_server(("127.0.0.1", 0)) as deaf:
        puller.transfers.pull(RemoteBlocks("source", "a", *deaf.getsockname()), 0, [1])
        failure(puller)


def test_a_process_that_is_killed_leaves_nothing_behind() -> None:
    with peers(Peer("parent", 400, lease_seconds=0.5)) as (parent,):
        parent.transfers.publish("held", [1, 2], payload=b"")
        parent.transfers.publish("unfinished", [3])
        tickets = [
            json.dumps(msgspec.to_builtins(parent.transfers.remote_blocks(name))) for name in ("held", "unfinished")
        ]
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, *tickets],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "OMP_NUM_THREADS": "1",
            },
        )
        try:
            assert child.stdout is not None
            remote_blocks = msgspec.json.decode(child.stdout.readline(), type=RemoteBlocks)
            parent.transfers.pull(remote_blocks, 0, list(range(10, 391)))  # one more than there will ever be
            child.send_signal(signal.SIGKILL)
            found = parent.events(2)
            assert isinstance(found["of the child"], PullFailed)
            assert found["held"] == Released("held", was_expired=True)
            parent.transfers.publish("unfinished", [4], payload=b"")
            assert parent.next_event() == Released("unfinished", was_expired=True)
            assert not parent.transfers._links
            assert parent.transfers._offers.num_offers == parent.transfers._pulls.num_pulls == 0
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
