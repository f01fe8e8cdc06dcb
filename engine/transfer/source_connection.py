"""The puller's threads for one source: one that connects and listens, one that sends, one that copies and verifies."""

import logging
import queue
import socket
import threading
from typing import Any, Protocol, runtime_checkable

from dispec.engine.transfer.handshake import Hello, Refused, greet
from dispec.engine.transfer.interface import TransferOptions, Transport, is_loopback
from dispec.engine.transfer.memory import CopyBlocks, Memories, candidates
from dispec.engine.transfer.messages import (
    MAX_PLACES,
    Ask,
    Data,
    Done,
    FromSource,
    Gone,
    Memory,
    OpenMemory,
    Read,
    Ready,
    decode_from_source,
)
from dispec.engine.transfer.outbox import Outbox
from dispec.engine.transfer.receiver import Fetch, PeerKey
from dispec.engine.transfer.wire import Connection

log = logging.getLogger(__name__)

DRAIN_BYTES = 1 << 20


@runtime_checkable
class PullerSide(Protocol):
    """Who decides what is asked."""

    def linked(self, key: PeerKey, ask_seconds: float, read_places: int) -> None: ...

    def answered(self, key: PeerKey, message: Ready | Gone, payload: bytes) -> None: ...

    def touch(self, read_id: int) -> Fetch | None: ...

    def landed(self, read_id: int, problem: str | None) -> None: ...

    def unlinked(self, key: PeerKey, link: "SourceConnection", reason: str) -> None: ...


class SourceConnection:
    """A connection to one source, from the first attempt to its end; `unlinked` is its last word."""

    def __init__(self, key: PeerKey, options: TransferOptions, own: Hello, memories: Memories, side: PullerSide):
        self._key, self._options, self._own, self._memories, self._side = key, options, own, memories, side
        self._connection: Connection | None = None
        self._outbox: Outbox | None = None
        self._copy: CopyBlocks | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self.transport: Transport | None = None
        self._copies: queue.SimpleQueue[tuple[int, Fetch | None] | None] = queue.SimpleQueue()
        self._copier = threading.Thread(target=self._copy_all, name="kv-copy", daemon=True)
        self._thread = threading.Thread(target=self._run, name="kv-pull", daemon=True)
        self._copier.start()
        self._thread.start()

    def send(self, message: Ask | Done) -> None:
        if self._outbox is not None:
            self._outbox.put(lambda connection: connection.send(message))

    def fetch(self, fetch: Fetch) -> None:
        """Have a read done, one way or the other."""
        if self._copy is not None:
            self._copies.put((fetch.read_id, None))
        elif self._outbox is not None:
            read = Read(fetch.transfer_id, fetch.read_id, fetch.first, len(fetch.own_blocks))
            self._outbox.put(lambda connection: connection.send(read))

    def abort(self) -> None:
        """End it; who is in the middle of something finds out."""
        with self._lock:
            self._is_closed = True
            if self._connection is not None:
                self._connection.abort()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        reason = "the connection was closed"
        try:
            self._serve()
        except (OSError, ValueError) as error:
            reason = f"{self._key[0]}:{self._key[1]}: {error}"
        except Exception as error:
            log.exception("a link to a source of KV blocks failed")
            reason = f"{self._key[0]}:{self._key[1]}: {type(error).__name__}: {error}"
        finally:
            self._copies.put(None)
            self._copier.join()
            if self._outbox is not None:
                self._outbox.close()
            if self._connection is not None:
                self._connection.close()
            self._side.unlinked(self._key, self, reason)

    def _serve(self) -> None:
        connection = self._connect()
        watchdog = threading.Timer(self._options.connect_seconds, connection.abort)
        watchdog.daemon = True
        watchdog.start()
        try:
            peer = greet(connection, self._options.secret or b"", self._own)
        finally:
            watchdog.cancel()
        if peer.engine_id != self._key[2]:
            raise Refused(f"engine {peer.engine_id} answers, {self._key[2]} was expected: was it restarted?")
        connection.set_timeout(self._options.stall_seconds)
        self.transport = self._choose(connection, peer)
        self._num_source_blocks = peer.num_blocks
        self._outbox = Outbox(connection, "kv-ask")
        read_places = max(1, min(MAX_PLACES, self._options.read_bytes // peer.block_bytes))
        ask_seconds = min(peer.lease_seconds, self._options.stall_seconds) / 4
        self._side.linked(self._key, ask_seconds, read_places)
        while True:
            self._handle(connection, connection.receive(decode_from_source, idle=True))

    def _connect(self) -> Connection:
        name, port, _ = self._key
        if self._options.secret is None and not is_loopback(name):
            raise Refused("not a loopback address: that needs a secret")
        sock = socket.create_connection((name, port), self._options.connect_seconds)
        connection = Connection(sock, self._options.connect_seconds)
        with self._lock:
            self._connection = connection
            if self._is_closed:
                raise ConnectionError("closed")
        return connection

    def _choose(self, connection: Connection, peer: Hello) -> Transport:
        """The first transport that works, opened."""

        def exchange(message: OpenMemory) -> Memory:
            connection.send(message)
            answer = connection.receive(decode_from_source)
            if not isinstance(answer, Memory):
                raise ConnectionError(f"{type(answer).__name__} came instead of the memory")
            return answer

        problems = []
        for transport in candidates(self._own, peer):
            if transport == "tcp":
                return transport
            try:
                self._copy = self._memories.open(transport, peer, self._own, exchange)
                return transport
            except Exception as error:  # of a library, or because the way is not there
                problems.append(f"{transport}: {error}")
                log.warning("KV transfer from %s: %s cannot be used: %s", peer.engine_id, transport, error)
        tried = "; ".join(problems) or f"it has {', '.join(peer.transports)}, we {', '.join(self._own.transports)}"
        raise Refused(f"no transport works: {tried}")

    def _handle(self, connection: Connection, message: FromSource) -> None:
        if isinstance(message, Data):
            self._receive(connection, message)
        elif isinstance(message, Ready):
            if message.blocks and max(message.blocks) >= self._num_source_blocks:
                raise ConnectionError(f"block {max(message.blocks)}, the source has {self._num_source_blocks}")
            payload = bytearray(message.payload_bytes or 0)
            connection.receive_into([memoryview(payload)])
            self._side.answered(self._key, message, bytes(payload))
        elif isinstance(message, Gone):
            self._side.answered(self._key, message, b"")
        else:
            raise ConnectionError(f"{type(message).__name__} came unasked")

    def _receive(self, connection: Connection, message: Data) -> None:
        """Bytes straight into the pages; what is not wanted any more goes nowhere."""
        fetch = self._side.touch(message.read_id) if self._copy is None else None
        if fetch is None:
            nowhere = memoryview(bytearray(min(DRAIN_BYTES, message.num_bytes)))
            left = message.num_bytes
            while left:
                connection.receive_into([nowhere[:left]])
                left -= min(left, len(nowhere))
            return
        pages: Any = self._memories.pages
        try:
            if message.num_bytes != len(fetch.own_blocks) * pages.block_bytes:
                raise ConnectionError(f"a read has {message.num_bytes} bytes for {len(fetch.own_blocks)} blocks")
            connection.receive_into(pages.incoming(fetch.own_blocks))
            pages.arrived(fetch.own_blocks)
        except BaseException as error:
            self._side.landed(message.read_id, f"the connection to the source broke: {error}")
            raise
        self._copies.put((message.read_id, fetch))

    def _copy_all(self) -> None:
        """Reads that this side does by itself, and the checksums of all."""
        while (job := self._copies.get()) is not None:
            read_id, fetch = job
            is_copied = fetch is not None
            fetch = fetch or self._side.touch(read_id)
            if fetch is None:
                continue
            try:
                problem = self._verify(fetch) if is_copied else self._copy_and_verify(fetch)
            except Exception as error:
                problem = f"{self.transport}: {type(error).__name__}: {error}"
            self._side.landed(read_id, problem)

    def _verify(self, fetch: Fetch) -> str | None:
        pages: Any = self._memories.pages
        problem: str | None = pages.verify(fetch.own_blocks, fetch.checksums, fetch.first)
        return problem

    def _copy_and_verify(self, fetch: Fetch) -> str | None:
        assert self._copy is not None
        if self.transport != "shm":
            self._copy(fetch.source_blocks, fetch.own_blocks)
            return self._verify(fetch)
        pages = self._memories.pages
        for number, (source, own) in enumerate(zip(fetch.source_blocks, fetch.own_blocks, strict=True)):
            self._copy([source], [own])  # a block at a time, so that its checksum finds it in the processor's cache
            if problem := pages.verify([own], [fetch.checksums[number]], fetch.first + number):
                return problem
        return None
