"""KV transfer with peers that are forged, broken, silent, killed or of another model."""

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

from dispec.engine.transfer import handshake, shared_memory
from dispec.engine.transfer.connection import Connection, SendQueue
from dispec.engine.transfer.handshake import HandshakeRefused, Hello
from dispec.engine.transfer.interface import Pulled, PullFailed, Released, RemoteBlocks
from tests.transfer_peers import FINGERPRINT, PATIENCE, SECRET, Peer, peers

ROOT = Path(__file__).resolve().parent.parent

CHILD = """
import json, signal, sys
import msgspec
from dispec.engine.transfer.interface import RemoteBlocks
from tests.transfer_peers import Peer
peer = Peer("child", 400)
held, unfinished = (msgspec.json.decode(argument, type=RemoteBlocks) for argument in sys.argv[1:])
peer.engine.pull(held, 0, [1, 2])
peer.next_event()
peer.engine.pull(unfinished, 0, [3, 4])
peer.engine.publish("of the child", list(range(10, 390)))
print(msgspec.json.encode(peer.engine.remote_blocks("of the child")).decode(), flush=True)
signal.pause()
"""


def failure(peer: Peer) -> str:
    event = peer.next_event()
    assert isinstance(event, PullFailed), event
    return event.reason


def settled(source: Peer, name: str, blocks: list[int], puller: Peer, own: int) -> None:
    """Publish, and wait until all checksums are computed: a later transfer's are, and they come in order."""
    source.engine.publish(name, blocks, payload=b"")
    source.engine.publish(f"after {name}", [0], payload=b"")
    puller.engine.pull(source.engine.remote_blocks(f"after {name}"), 0, [own])
    assert isinstance(puller.next_event(), Pulled)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"secret": "known to no other peer"}, "does not have our secret"),
        ({"secret": None}, "does not have our secret"),
        ({"fingerprint": "another"}, "fingerprint differs: the source has a model, the puller another"),
        ({"num_layers": 2}, "number of layers differs: the source has 3, the puller 2"),
    ],
)
def test_peers_that_do_not_fit_are_refused(what: dict[str, object], said: str) -> None:
    with peers(Peer("source"), Peer("puller", **what)) as (source, puller):
        puller.engine.pull(source.engine.remote_blocks("a"), 0, [1])
        assert said in failure(puller)


def test_another_engine_at_the_address_is_not_pulled_from() -> None:
    with peers(Peer("restarted"), Peer("puller")) as (source, puller):
        puller.engine.pull(RemoteBlocks("first", "a", *source.engine.address), 0, [1])
        assert "was it restarted?" in failure(puller)


def test_a_pull_from_a_closed_port_fails() -> None:
    with peers(Peer("puller")) as (puller,), socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
        unused.close()
        puller.engine.pull(RemoteBlocks("source", "a", "127.0.0.1", port), 0, [1])
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
def test_invalid_bytes_end_their_connection_and_nothing_else(data: bytes) -> None:
    with peers(Peer("source"), Peer("puller", seed=1)) as (source, puller):
        with socket.create_connection(source.engine.address, PATIENCE) as stranger:
            stranger.sendall(data)
            assert ended(stranger)
        source.engine.publish("a", [1], payload=b"")
        puller.engine.pull(source.engine.remote_blocks("a"), 0, [2])
        assert puller.next_event() == Pulled("a", b"")


def ended(sock: socket.socket) -> bool:
    """Whether the other side closes; it may say why first."""
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(4096):
            pass
    return True


def hello(source: Peer) -> Hello:
    """Return the hello of a peer whose cache has the source's geometry."""
    blocks = source.engine._blocks
    return Hello("peer", FINGERPRINT, blocks.num_layers, 40, blocks.layer_bytes, "cpu", ["tcp"], "", 0)


def authenticated(source: Peer) -> Connection:
    connection = Connection(socket.create_connection(source.engine.address, PATIENCE), PATIENCE)
    handshake.connect(connection, SECRET.encode(), hello(source))
    return connection


def test_a_peer_of_another_version_is_refused_by_its_version() -> None:
    with peers(Peer("source")) as (source,):
        connection = Connection(socket.create_connection(source.engine.address, PATIENCE), PATIENCE)
        other = msgspec.structs.replace(hello(source), version=1, layer_bytes=0)  # a field that this version refuses
        with contextlib.closing(connection), pytest.raises(HandshakeRefused, match="protocol version is 1, must be 4"):
            handshake.connect(connection, SECRET.encode(), other)


@pytest.mark.parametrize("data", [struct.pack(">I", (17 << 20) + 1), struct.pack(">I", 3) + b"\x81\x01\x02"])
def test_an_invalid_message_ends_the_connection(data: bytes) -> None:
    with peers(Peer("source")) as (source,):
        connection = authenticated(source)
        connection.socket.sendall(data)
        assert ended(connection.socket)
        connection.close()


def test_a_reflected_challenge_is_refused() -> None:
    with peers(Peer("source")) as (source,):
        connection = Connection(socket.create_connection(source.engine.address, PATIENCE), PATIENCE)
        decode = msgspec.msgpack.decode
        connection.send({"type": "dispec-transfer", "nonce": bytes(32)})
        challenge = connection.receive(decode)
        connection.send({"type": "_Answer", "proof": challenge["proof"], "hello": b""})
        assert connection.receive(decode)["reason"] == "the puller does not have our secret"
        assert ended(connection.socket)
        connection.close()


def test_the_number_of_handshakes_is_bounded() -> None:
    with peers(Peer("source", max_handshakes=2, connect_seconds=PATIENCE)) as (source,):
        idle = [socket.create_connection(source.engine.address, PATIENCE) for _ in range(4)]
        assert all(map(ended, idle[2:]))
        assert select.select(idle[:2], [], [], 0)[0] == []
        for sock in idle:
            sock.close()


def test_the_time_of_a_handshake_is_bounded() -> None:
    with peers(Peer("source", connect_seconds=0.3), Peer("puller")) as (source, puller):
        with socket.create_connection(source.engine.address, PATIENCE) as idle:
            idle.sendall(struct.pack(">I", 400))  # and not a byte of what is announced
            assert ended(idle)
        source.engine.publish("a", [1], payload=b"")
        puller.engine.pull(source.engine.remote_blocks("a"), 0, [2])
        assert puller.next_event() == Pulled("a", b"")


@pytest.mark.smoke
@pytest.mark.parametrize("transport", ["shm", "nixl"])
def test_bytes_that_change_after_they_were_published_are_caught(transport: str) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl_cu12")
    allowed = (transport,)
    with peers(Peer("source", transports=allowed), Peer("puller", transports=allowed, seed=1)) as (source, puller):
        settled(source, "a", [5, 6, 7], puller, 9)
        source.kv_cache.values[2, 6].view(torch.uint8).view(-1)[-1] ^= 1
        puller.engine.pull(source.engine.remote_blocks("a"), 0, [1, 2, 3])
        assert "the checksum of block 1 is wrong" in failure(puller)
        assert source.events(1).keys() == {"a"}  # released by the puller


class Proxy:
    """Forwards between a puller and its source. flip: byte of the source's stream to change; stop: where to cut it."""

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


def test_a_flipped_bit_is_caught_and_the_secret_is_not_on_the_wire() -> None:
    options = {"transports": ("tcp",)}
    with peers(Peer("source", **options), Peer("puller", seed=1, **options)) as (source, puller):
        settled(source, "a", list(range(1, 21)), puller, 30)
        proxy = Proxy(source.engine.address, flip=30_000)
        puller.engine.pull(RemoteBlocks("source", "a", "127.0.0.1", proxy.port), 0, list(range(5, 25)))
        assert "checksum" in failure(puller)
        assert len(proxy.seen) > 20 * 3072
        assert SECRET.encode() not in proxy.seen


def test_a_connection_that_breaks_in_the_middle_of_a_read_fails_the_pull() -> None:
    options = {"transports": ("tcp",)}
    with peers(Peer("source", **options), Peer("puller", seed=1, **options)) as (source, puller):
        settled(source, "a", list(range(1, 21)), puller, 30)
        proxy = Proxy(source.engine.address, stop=30_000)
        puller.engine.pull(RemoteBlocks("source", "a", "127.0.0.1", proxy.port), 0, list(range(5, 25)))
        assert "the peer closed the connection" in failure(puller)


def test_a_source_that_is_silent_before_the_handshake_fails_the_pull() -> None:
    with peers(Peer("puller", connect_seconds=0.3)) as (puller,), socket.create_server(("127.0.0.1", 0)) as silent:
        puller.engine.pull(RemoteBlocks("source", "a", *silent.getsockname()), 0, [1])
        failure(puller)


def test_a_source_that_is_silent_after_the_handshake_fails_the_pull() -> None:
    with peers(Peer("puller", stall_seconds=0.3)) as (puller,), socket.create_server(("127.0.0.1", 0)) as listener:
        puller.engine.pull(RemoteBlocks("peer", "a", *listener.getsockname()), 0, [1])
        connection = Connection(listener.accept()[0], PATIENCE)
        handshake.accept(connection, SECRET.encode(), hello(puller))
        assert "the source was silent for 0.3 s" in failure(puller)
        connection.close()


def test_a_send_that_is_queued_after_closing_still_runs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = Connection(socket.create_connection(listener.getsockname()), PATIENCE)
        send_queue = SendQueue(connection, "test")
        send_queue.close()
        runs: list[Connection] = []
        send_queue.put(runs.append)
        assert runs == [connection]
        connection.close()


def test_messages_stay_in_order_whether_they_must_wait_or_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    send_queue = SendQueue(Connection(near, PATIENCE), "test")
    messages = [{"number": number, "filling": bytes(2_000_000 * (number % 3))} for number in range(12)]
    for message in messages[:9]:
        send_queue.send(message)  # returns, although nothing is read
    reader = Connection(far, PATIENCE)
    assert [reader.receive(msgspec.msgpack.decode) for _ in range(9)] == messages[:9]
    for message in messages[9:]:
        send_queue.send(message)
        assert reader.receive(msgspec.msgpack.decode) == message
    send_queue.close()
    with pytest.raises(ConnectionError):
        reader.receive(msgspec.msgpack.decode)
    far.close()
    near.close()


def test_a_handle_of_other_memory_is_refused(tmp_path: Path) -> None:
    memory = shared_memory.allocate(4096)
    process, descriptor, inode = shared_memory.export(memory)
    assert shared_memory.map_read_only((process, descriptor, inode)).nbytes == 4096
    with pytest.raises(ValueError, match="does not lead to sealed shared memory"):
        shared_memory.map_read_only((process, descriptor, inode + 1))
    with (tmp_path / "file").open("wb") as file, pytest.raises((OSError, ValueError)):
        shared_memory.map_read_only((process, file.fileno(), os.fstat(file.fileno()).st_ino))


def test_transfers_with_a_killed_process_end() -> None:
    with peers(Peer("parent", 400, lease_seconds=0.5)) as (parent,):
        parent.engine.publish("held", [1, 2], payload=b"")
        parent.engine.publish("unfinished", [3])
        handles = [
            json.dumps(msgspec.to_builtins(parent.engine.remote_blocks(name))) for name in ("held", "unfinished")
        ]
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, *handles],
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
            parent.engine.pull(remote_blocks, 0, list(range(10, 391)))  # one more than there will ever be
            child.send_signal(signal.SIGKILL)
            found = parent.events(2)
            assert isinstance(found["of the child"], PullFailed)
            assert found["held"] == Released("held", was_expired=True)
            parent.engine.publish("unfinished", [4], payload=b"")
            assert parent.next_event() == Released("unfinished", was_expired=True)
            assert not parent.engine._clients
            assert parent.engine._sender.num_transfers == parent.engine._receiver.num_pulls == 0
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
