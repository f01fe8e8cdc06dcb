"""Threads of the source: one accepts; for each puller, one receives and one sends."""

import contextlib
import itertools
import logging
import os
import socket
import threading
from collections.abc import Callable

from dispec.engine.transfer import handshake
from dispec.engine.transfer.connection import Connection, SendQueue
from dispec.engine.transfer.handshake import Hello
from dispec.engine.transfer.interface import TransferOptions
from dispec.engine.transfer.messages import (
    BlockData,
    BlocksReady,
    MemoryHandle,
    OpenMemory,
    TransferEnded,
    decode_from_puller,
)
from dispec.engine.transfer.sender import Sender
from dispec.engine.transfer.transports import Transports

log = logging.getLogger(__name__)

ACCEPT_AGAIN_SECONDS = 0.05

Apply = Callable[..., None]  # a method of a state machine, and its arguments but the time: do what it returns


class Server:
    """Listens from the start and accepts pullers from `start` on. Raises ValueError if it cannot listen."""

    def __init__(self, options: TransferOptions) -> None:
        self._options = options
        self._listener = _listen(options.host, options.port)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._lock = threading.Lock()
        self._acceptor = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._serving: dict[Connection, threading.Thread] = {}
        self._send_queues: dict[int, SendQueue] = {}
        self._num_handshakes = 0
        self._peer_ids = itertools.count()
        self._closing = threading.Event()

    def start(self, hello: Hello, transports: Transports, sender: Sender, apply: Apply) -> None:
        """Serve pullers. Their messages go to `sender`."""
        self._hello, self._transports, self._sender, self._apply = hello, transports, sender, apply
        self._acceptor.start()

    def send(self, peer: int, message: BlocksReady | TransferEnded | MemoryHandle) -> None:
        """Queue a message to a puller; nothing if it has disconnected."""
        if send_queue := self._send_queues.get(peer):
            send_queue.send(message)

    def send_blocks(self, peer: int, transfer_id: str, read_id: int, blocks: list[int]) -> None:
        """Queue the bytes of blocks to a puller. `Sender.sent` follows, whether they could be sent or not."""

        def job(connection: Connection) -> None:
            try:
                cache = self._transports.blocks
                message = BlockData(read_id, len(blocks) * cache.block_bytes)
                connection.send(message, cache.send_buffers(blocks))
            finally:
                self._apply(self._sender.sent, transfer_id)

        if send_queue := self._send_queues.get(peer):
            send_queue.put(job)
        else:
            self._apply(self._sender.sent, transfer_id)

    def close(self) -> None:
        """Close all connections and wait for the threads."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if self._acceptor.is_alive():
            self._acceptor.join()
        with self._lock:
            serving = dict(self._serving)
        for connection, thread in serving.items():
            connection.abort()
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:  # out of descriptors, for example: that passes
                self._closing.wait(ACCEPT_AGAIN_SECONDS)
                continue
            try:
                connection = Connection(sock, self._options.connect_seconds)
            except OSError:
                sock.close()
                continue
            with self._lock:
                is_full = (
                    len(self._serving) >= self._options.max_connections
                    or self._num_handshakes >= self._options.max_handshakes
                )
                if not is_full:
                    self._num_handshakes += 1
                    thread = threading.Thread(target=self._serve, args=(connection,), name="kv-serve", daemon=True)
                    self._serving[connection] = thread
                    thread.start()
            if is_full:
                connection.close()

    def _serve(self, connection: Connection) -> None:
        """Serve a connection. An error of its peer ends this connection and nothing else."""
        try:
            self._authenticate(connection)
            self._receive(connection)
        except (OSError, ValueError) as error:
            if not self._closing.is_set():
                log.debug("a puller's connection has ended: %s", error)
        finally:
            connection.close()
            with self._lock:
                del self._serving[connection]

    def _authenticate(self, connection: Connection) -> None:
        try:
            with connection.time_limit(self._options.connect_seconds):
                handshake.accept(connection, self._options.secret_bytes, self._hello)
        finally:
            with self._lock:
                self._num_handshakes -= 1
        connection.set_timeout(self._options.stall_seconds)

    def _receive(self, connection: Connection) -> None:
        peer = next(self._peer_ids)
        send_queue = self._send_queues[peer] = SendQueue(connection, "kv-send")
        try:
            while True:
                connection.wait(None)
                message = connection.receive(decode_from_puller)
                if isinstance(message, OpenMemory):
                    self.send(peer, self._transports.export(message))
                else:
                    self._apply(self._sender.receive, peer, message)
        finally:
            del self._send_queues[peer]
            send_queue.close()
            self._apply(self._sender.disconnected, peer)


def _listen(address: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family, backlog=128)
    except (socket.gaierror, UnicodeError):
        raise ValueError(f"kv_transfer_host is {address!r}, which is no address of this machine") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(f"cannot listen on kv_transfer_host {address!r}, kv_transfer_port {port} ({why})") from error
