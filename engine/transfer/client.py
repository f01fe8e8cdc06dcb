"""Threads of the puller for one source: one connects and receives, one verifies, one sends what must wait."""

import logging
import queue
import socket
import threading
from collections.abc import Callable

from dispec.engine.transfer import handshake
from dispec.engine.transfer.connection import Connection, SendQueue
from dispec.engine.transfer.handshake import HandshakeRefused, Hello
from dispec.engine.transfer.interface import TransferOptions, Transport, is_loopback
from dispec.engine.transfer.kv_blocks import CopyBlocks, PendingChecksums, mismatch
from dispec.engine.transfer.messages import (
    MAX_BLOCKS,
    BlockData,
    BlocksReady,
    FromSource,
    PullDone,
    QueryBlocks,
    ReadBlocks,
    TransferEnded,
    decode_from_source,
)
from dispec.engine.transfer.receiver import Fetch, PeerKey, Receiver
from dispec.engine.transfer.server import Apply
from dispec.engine.transfer.transports import Transports, usable_transports

log = logging.getLogger(__name__)

DISCARD_BYTES = 1 << 20

Read = tuple[int, tuple[Fetch, PendingChecksums] | None]  # its id; of a received one its blocks too


class Client:
    """A connection to one source, from the first attempt to its end.

    apply: does what a method of `receiver` says. start_read: `Receiver.start_read` now. on_end: called at last, with
    the reason.
    """

    def __init__(
        self,
        key: PeerKey,
        options: TransferOptions,
        hello: Hello,
        transports: Transports,
        receiver: Receiver,
        *,
        apply: Apply,
        start_read: Callable[[int], Fetch | None],
        on_end: Callable[["Client", str], None],
    ) -> None:
        self.key = key
        self.transport: Transport | None = None
        self._options, self._hello, self._transports, self._receiver = options, hello, transports, receiver
        self._apply, self._start_read, self._on_end = apply, start_read, on_end
        self._connection: Connection | None = None
        self._send_queue: SendQueue | None = None
        self._copy: CopyBlocks | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self._reads: queue.SimpleQueue[Read | None] = queue.SimpleQueue()
        self._copier = threading.Thread(target=self._end_reads, name="kv-copy", daemon=True)
        self._thread = threading.Thread(target=self._run, name="kv-pull", daemon=True)
        self._thread.start()

    def send(self, message: QueryBlocks | PullDone | ReadBlocks) -> None:
        if self._send_queue is not None:
            self._send_queue.send(message)

    def fetch(self, fetch: Fetch) -> None:
        """Begin a read: copy the blocks here, or request their bytes."""
        if self._copy is not None:
            self._reads.put((fetch.read_id, None))
        else:
            self.send(ReadBlocks(fetch.transfer_id, fetch.read_id, fetch.first, len(fetch.own_blocks)))

    def abort(self) -> None:
        """Close the connection; reads under way fail."""
        with self._lock:
            self._is_closed = True
            if self._connection is not None:
                self._connection.abort()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        host, port, _ = self.key
        reason = "the connection was closed"
        try:
            self._serve()
        except (OSError, ValueError) as error:
            reason = f"{host}:{port}: {error}"
        except Exception as error:
            log.exception("a connection to a source of KV blocks failed")
            reason = f"{host}:{port}: {type(error).__name__}: {error}"
        finally:
            self._reads.put(None)
            if self._copier.is_alive():
                self._copier.join()
            self._copy = None  # unmaps the source's memory
            if self._send_queue is not None:
                self._send_queue.close()
            if self._connection is not None:
                self._connection.close()
            self._on_end(self, reason)

    def _serve(self) -> None:
        options, engine_id = self._options, self.key[2]
        connection = self._connect()
        with connection.time_limit(options.connect_seconds):
            peer = handshake.connect(connection, options.secret_bytes, self._hello)
        if peer.engine_id != engine_id:
            raise HandshakeRefused(f"engine {peer.engine_id} answers, {engine_id} was expected: was it restarted?")
        connection.set_timeout(options.stall_seconds)
        self.transport = self._open_transport(connection, peer)
        self._num_source_blocks, self._source_device = peer.num_blocks, peer.device
        self._send_queue = SendQueue(connection, "kv-query")
        query_seconds = min(peer.lease_seconds, options.stall_seconds) / 4
        # By CUDA IPC a read of any size is one launch.
        read_blocks = MAX_BLOCKS if self.transport == "cuda_ipc" else options.read_bytes // peer.block_bytes
        max_read_blocks = max(1, min(MAX_BLOCKS, read_blocks))
        self._apply(self._receiver.connected, self.key, query_seconds, max_read_blocks)
        copies_here = self.transport == "cuda_ipc"  # in 0.1 ms, which is what another thread takes to wake up
        if not copies_here:
            self._copier.start()
        while True:
            while copies_here and not self._reads.empty():
                self._end_read(self._reads.get())
            is_waiting = self._receiver.is_waiting_for(self.key)
            if connection.wait(options.stall_seconds):
                self._handle(connection, connection.receive(decode_from_source))
            elif is_waiting and self._receiver.is_waiting_for(self.key):
                raise ConnectionError(f"the source was silent for {options.stall_seconds:g} s")

    def _connect(self) -> Connection:
        host, port, _ = self.key
        seconds = self._options.connect_seconds
        if self._options.secret is None and not is_loopback(host):
            raise HandshakeRefused("not a loopback address: that needs a secret")
        connection = Connection(socket.create_connection((host, port), seconds), seconds)
        with self._lock:
            self._connection = connection
            if self._is_closed:
                raise ConnectionError("the connection was closed")
        return connection

    def _open_transport(self, connection: Connection, peer: Hello) -> Transport:
        """Open the first transport that works. Raises HandshakeRefused if none does."""
        problems = []
        for transport in usable_transports(self._hello, peer):
            if transport == "tcp":
                return transport
            try:
                self._copy = self._transports.open(transport, peer, connection)
                return transport
            except Exception as error:  # of a library too
                problems.append(f"{transport}: {error}")
                log.warning("KV transfer from %s: %s cannot be used: %s", peer.engine_id, transport, error)
        names = f"the source has {', '.join(peer.transports)}, the puller {', '.join(self._hello.transports)}"
        raise HandshakeRefused(f"no transport works: {'; '.join(problems) or names}")

    def _handle(self, connection: Connection, message: FromSource) -> None:
        if isinstance(message, BlockData):
            self._receive_blocks(connection, message)
        elif isinstance(message, BlocksReady):
            if message.blocks and max(message.blocks) >= self._num_source_blocks:
                raise ConnectionError(f"block {max(message.blocks)}, the source has {self._num_source_blocks}")
            self._apply(self._receiver.receive, self.key, message)
        elif isinstance(message, TransferEnded):
            self._apply(self._receiver.receive, self.key, message)
        else:
            raise ConnectionError(f"{type(message).__name__} came without a request")

    def _receive_blocks(self, connection: Connection, message: BlockData) -> None:
        """Receive straight into the cache; discard the bytes of a cancelled read."""
        fetch = self._start_read(message.read_id) if self._copy is None else None
        if fetch is None:
            buffer = memoryview(bytearray(min(DISCARD_BYTES, message.num_bytes)))
            left = message.num_bytes
            while left:
                connection.receive_into([buffer[:left]])
                left -= min(left, len(buffer))
            return
        cache = self._transports.blocks
        try:
            if message.num_bytes != len(fetch.own_blocks) * cache.block_bytes:
                raise ConnectionError(f"a read has {message.num_bytes} bytes for {len(fetch.own_blocks)} blocks")
            connection.receive_into(cache.receive_buffers(fetch.own_blocks))
            checksums = cache.finish_receive(fetch.own_blocks, self._source_device)
        except BaseException as error:
            self._apply(self._receiver.end_read, message.read_id, f"the connection to the source broke: {error}")
            raise
        self._reads.put((message.read_id, (fetch, checksums)))

    def _end_reads(self) -> None:
        while (read := self._reads.get()) is not None:
            self._end_read(read)

    def _end_read(self, read: Read | None) -> None:
        """Copy the blocks of a read that was not received, and verify them."""
        if read is None:
            return
        read_id, received = read
        fetch = received[0] if received else self._start_read(read_id)
        if fetch is None:
            return
        try:
            if received:
                checksums = received[1]()
            else:
                assert self._copy is not None
                checksums = self._copy(fetch.source_blocks, fetch.own_blocks)
            problem = mismatch(checksums, fetch.checksums, fetch.first)
        except Exception as error:
            problem = f"{self.transport}: {type(error).__name__}: {error}"
        self._apply(self._receiver.end_read, read_id, problem)
