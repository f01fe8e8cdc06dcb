"""The source's threads: one that accepts, and for each puller one that listens to it and one that sends."""

import contextlib
import functools
import itertools
import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from dispec.engine.transfer import host
from dispec.engine.transfer.handshake import Hello, welcome
from dispec.engine.transfer.interface import TransferOptions
from dispec.engine.transfer.memory import Memories
from dispec.engine.transfer.messages import Ask, Data, Done, Gone, Memory, OpenMemory, Read, Ready, decode_from_puller
from dispec.engine.transfer.outbox import Outbox
from dispec.engine.transfer.wire import Connection

log = logging.getLogger(__name__)

ACCEPT_AGAIN_SECONDS = 0.05


@runtime_checkable
class SourceSide(Protocol):
    """Who decides what is answered."""

    def heard(self, peer: int, message: Ask | Read | Done) -> None: ...

    def left(self, peer: int) -> None: ...

    def sent(self, transfer_id: str) -> None: ...


class Server:
    """Listens from the start, accepts once `start` is called, when there is something to serve.

    Raises ValueError if it cannot listen where the options say.
    """

    def __init__(self, options: TransferOptions) -> None:
        self._options = options
        self._listeners = [_listen(options.host, options.port)]
        self.address: tuple[str, int] = self._listeners[0].getsockname()[:2]
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._threads: set[threading.Thread] = set()
        self._outboxes: dict[int, Outbox] = {}
        self._num_handshakes = 0
        self._names = itertools.count()
        self._is_closed = False
        self._closing = threading.Event()

    def listen_locally(self) -> str:
        """A second way in, for processes of this machine; its name, or nothing where there is none."""
        try:
            listener, name = host.listen_locally()
        except OSError:
            return ""
        self._listeners.append(listener)
        return name

    def start(self, hello: Hello, memories: Memories, side: SourceSide) -> None:
        self._hello, self._memories, self._side = hello, memories, side
        for listener in self._listeners:
            serve = self._serve_memory if listener.family == socket.AF_UNIX else self._serve
            self._spawn(functools.partial(self._accept, listener, serve), "kv-accept")

    def send(self, peer: int, message: Ready | Gone | Memory, payload: bytes = b"") -> None:
        """To a puller; nothing if it is gone."""
        if outbox := self._outboxes.get(peer):
            outbox.put(lambda connection: connection.send(message, [payload]))

    def send_blocks(self, peer: int, transfer_id: str, read_id: int, blocks: list[int]) -> None:
        """The side is told when they are sent, or cannot be."""

        def job(connection: Connection) -> None:
            try:
                message = Data(read_id, len(blocks) * self._memories.pages.block_bytes)
                connection.send(message, self._memories.pages.outgoing(blocks))
            finally:
                self._side.sent(transfer_id)

        if outbox := self._outboxes.get(peer):
            outbox.put(job)
        else:
            self._side.sent(transfer_id)

    def close(self) -> None:
        """Close all connections and wait for the threads."""
        with self._lock:
            self._is_closed = True
            for connection in self._connections:
                connection.abort()
        self._closing.set()
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        for listener in self._listeners:
            listener.close()

    def _spawn(self, run: Callable[[], None], name: str) -> None:
        def forget() -> None:
            try:
                run()
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=forget, name=name, daemon=True)
        with self._lock:  # `close` joins what it finds here, and only what was started can be joined
            self._threads.add(thread)
            thread.start()

    def _accept(self, listener: socket.socket, serve: Callable[[Connection], None]) -> None:
        while not self._is_closed:
            try:
                sock, _ = listener.accept()
            except OSError:  # no descriptors left, say: that passes
                self._closing.wait(ACCEPT_AGAIN_SECONDS)
                continue
            try:
                connection = Connection(sock, self._options.connect_seconds)
            except OSError:
                sock.close()
                continue
            with self._lock:
                is_full = (
                    self._is_closed
                    or len(self._connections) >= self._options.max_connections
                    or self._num_handshakes >= self._options.max_handshakes
                )
                if not is_full:
                    self._connections.add(connection)
                    self._num_handshakes += 1
            if is_full:
                connection.close()
            else:
                self._spawn(functools.partial(self._guard, connection, serve), "kv-serve")

    def _guard(self, connection: Connection, serve: Callable[[Connection], None]) -> None:
        """Whatever a peer does ends its connection and nothing else."""
        try:
            serve(connection)
        except (OSError, ValueError) as error:
            if not self._is_closed:
                log.debug("a puller's connection has ended: %s", error)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _shake_hands(self, connection: Connection) -> None:
        """Within one time for all of it, however slowly the bytes come."""
        watchdog = threading.Timer(self._options.connect_seconds, connection.abort)
        watchdog.daemon = True
        watchdog.start()
        try:
            if connection.socket.family == socket.AF_UNIX:
                host.check_same_user(connection.socket)
            welcome(connection, self._options.secret or b"", self._hello)
        finally:
            watchdog.cancel()
            with self._lock:
                self._num_handshakes -= 1
        connection.set_timeout(self._options.stall_seconds)

    def _serve(self, connection: Connection) -> None:
        self._shake_hands(connection)
        peer = next(self._names)
        outbox = self._outboxes[peer] = Outbox(connection, "kv-send")
        try:
            while True:
                message = connection.receive(decode_from_puller, idle=True)
                if isinstance(message, OpenMemory):
                    self.send(peer, self._memories.export(message))
                else:
                    self._side.heard(peer, message)
        finally:
            del self._outboxes[peer]
            outbox.close()
            self._side.left(peer)

    def _serve_memory(self, connection: Connection) -> None:
        """Hand over the memory's descriptor, to a process of the same user that has the secret."""
        self._shake_hands(connection)
        socket.send_fds(connection.socket, [b"\0"], [self._memories.fd])


def _listen(address: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family, backlog=128)
    except (socket.gaierror, UnicodeError):
        raise ValueError(f"kv_transfer_host is {address!r}, which is no address of this machine") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(f"cannot listen on kv_transfer_host {address!r}, kv_transfer_port {port} ({why})") from error
