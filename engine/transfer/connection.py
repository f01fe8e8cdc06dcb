"""A socket that carries frames: four bytes of length, a msgpack message, then the raw buffers that it announces.

Reads and writes block, with a timeout in the kernel, so that a large buffer takes one system call without the GIL. The
kernel sizes its own buffers: 4 MiB set by hand halved the rate on loopback, because they fall out of the CPU's cache.
"""

import contextlib
import logging
import queue
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from dispec.engine.transfer.messages import MAX_MESSAGE_BYTES, encode

log = logging.getLogger(__name__)

BUFFERS_PER_CALL = 1024  # IOV_MAX of Linux
MAX_QUEUED_SENDS = 16384  # per peer; a peer that requests more than it reads is disconnected
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # a vanished machine is noticed in a minute

Message = TypeVar("Message")


class Connection:
    """One socket. One thread may send while another receives; any thread may call `abort`, the owner calls `close`."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.socket = sock
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.set_timeout(timeout)

    def set_timeout(self, seconds: float) -> None:
        """Set the limit of a read or write that makes no progress."""
        value = struct.pack("ll", *divmod(max(1, int(seconds * 1_000_000)), 1_000_000))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    @contextlib.contextmanager
    def time_limit(self, seconds: float) -> Iterator[None]:
        """Abort the connection if the body takes longer, however slowly bytes trickle in."""
        timer = threading.Timer(seconds, self.abort)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def send(self, message: object, parts: Iterable[Sequence[memoryview]] = ()) -> None:
        """Send a message, then the buffers of each part as it comes.

        Raises ConnectionError if the peer is gone or takes nothing for the timeout.
        """
        head: list[memoryview | bytes] = [_frame(message)]
        for part in parts:
            _transfer(self.socket.sendmsg, [*head, *part])
            head = []
        _transfer(self.socket.sendmsg, head)

    def send_now(self, data: bytes) -> int:
        """Send what goes without waiting, and return the number of bytes. Raises OSError if the peer is gone."""
        try:
            return self.socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def send_rest(self, data: bytes) -> None:
        """Send bytes of a frame. Raises ConnectionError as `send`."""
        _transfer(self.socket.sendmsg, [data])

    def wait(self, seconds: float | None) -> bool:
        """Wait until there is something to receive, or the peer has closed. Returns False after `seconds`."""
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        return bool(poller.poll(None if seconds is None else seconds * 1000))

    def receive(self, decode: Callable[[bytearray], Message], limit: int = MAX_MESSAGE_BYTES) -> Message:
        """Receive a message. Raises ConnectionError if it is too long or invalid, if the peer stalls or closes."""
        length_bytes = bytearray(4)
        self.receive_into([memoryview(length_bytes)])
        length = int.from_bytes(length_bytes, "big")
        if not 0 < length <= limit:
            raise ConnectionError(f"a message has {length} bytes, must have 1 to {limit}")
        encoded = bytearray(length)
        self.receive_into([memoryview(encoded)])
        try:
            return decode(encoded)
        except ValueError as error:  # msgspec's errors are among them
            raise ConnectionError(f"a message is invalid: {error}") from None

    def receive_into(self, buffers: Sequence[memoryview]) -> None:
        """Fill buffers. Raises ConnectionError if the peer stalls or closes before that."""
        _transfer(lambda left: self.socket.recvmsg_into(left, 0, socket.MSG_WAITALL)[0], buffers)

    def abort(self) -> None:
        """Fail all reads and writes under way. The descriptor stays open, so that no other socket gets its number."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.abort()
        self.socket.close()


def _frame(message: object) -> bytes:
    encoded = encode(message)
    return struct.pack(">I", len(encoded)) + encoded


def _transfer(call: Callable[[list[memoryview]], int], buffers: Sequence[memoryview | bytes]) -> None:
    """Repeat a scatter or gather call until all buffers are through."""
    left = [memoryview(buffer) for buffer in buffers if len(buffer)]
    at = 0
    while at < len(left):
        try:
            count = call(left[at : at + BUFFERS_PER_CALL])
        except BlockingIOError:
            raise ConnectionError("the peer stalled") from None
        except ConnectionError:
            raise
        except OSError as error:
            raise ConnectionError(str(error)) from None
        if not count:
            raise ConnectionError("the peer closed the connection")
        while count and count >= len(left[at]):
            count -= len(left[at])
            at += 1
        if count:
            left[at] = left[at][count:]


SendJob = Callable[[Connection], None]


class SendQueue:
    """Sends over a connection in order: jobs in a thread of its own, a message at once where nothing waits before it.

    Every job runs once, even after a failure: it then finds the connection closed.
    """

    def __init__(self, connection: Connection, thread_name: str) -> None:
        self._connection = connection
        self._jobs: queue.SimpleQueue[SendJob | None] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._is_closed = False
        self._num_waiting = 0  # jobs that have not ended
        self._thread = threading.Thread(target=self._run_all, name=thread_name, daemon=True)
        self._thread.start()

    def send(self, message: object) -> None:
        """Send a message, from this thread if that takes no waiting: another thread would take 0.1 ms to wake up."""
        data = _frame(message)
        with self._lock:
            if not self._num_waiting and not self._is_closed:
                try:
                    data = data[self._connection.send_now(data) :]
                except OSError:
                    self._connection.abort()
                    return
            if data:
                self.put(lambda connection: connection.send_rest(data))

    def put(self, job: SendJob) -> None:
        if self._jobs.qsize() > MAX_QUEUED_SENDS:
            self._connection.abort()
        with self._lock:
            if not self._is_closed:
                self._num_waiting += 1
                self._jobs.put(job)
                return
        self._run(job)

    def close(self) -> None:
        """Abort the connection and wait until all jobs have run."""
        self._connection.abort()
        with self._lock:
            self._is_closed = True
            self._jobs.put(None)
        self._thread.join()

    def _run_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._run(job)
            with self._lock:
                self._num_waiting -= 1

    def _run(self, job: SendJob) -> None:
        try:
            job(self._connection)
        except Exception as error:
            if not isinstance(error, ConnectionError):
                log.exception("cannot send KV blocks")
            self._connection.abort()
