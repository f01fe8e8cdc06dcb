"""Frames on a socket: four bytes of length, a msgpack header of bounded size, then raw buffers that it announces.

Reads and writes block, with a timeout that the kernel keeps, so that large buffers take one system call each and the
interpreter's lock is free meanwhile. The kernel chooses its own buffers: 4 MiB set by hand halved the rate on loopback,
since they fall out of the processor's cache.
"""

import contextlib
import socket
import struct
from collections.abc import Callable, Sequence
from typing import TypeVar

from dispec.engine.transfer.messages import MAX_HEADER_BYTES, encode

BUFFERS_AT_ONCE = 1024  # IOV_MAX of Linux

Message = TypeVar("Message")


class Connection:
    """One socket. One thread may send while another receives; any may call `abort`, the owner closes at last."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._socket = sock
        sock.setblocking(True)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, option):  # a machine that vanishes holds no connection for longer than a minute
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.set_timeout(timeout)

    @property
    def socket(self) -> socket.socket:
        return self._socket

    def set_timeout(self, seconds: float) -> None:
        """Of a single read or write that makes no progress."""
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000) or (0 if seconds >= 1 else 1))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def send(self, message: object, buffers: Sequence[memoryview | bytes] = ()) -> None:
        """Raises ConnectionError if the peer takes nothing for the timeout, or is gone."""
        header = encode(message)
        if len(header) > MAX_HEADER_BYTES:
            raise ValueError(f"a header has {len(header)} bytes, must have at most {MAX_HEADER_BYTES}")
        self._move(self._write, [struct.pack(">I", len(header)) + header, *buffers])

    def receive(
        self, decode: Callable[[bytes], Message], limit: int = MAX_HEADER_BYTES, *, idle: bool = False
    ) -> Message:
        """The next header. idle: to wait for its first byte without a timeout.

        Raises ConnectionError for what is too long, cannot be decoded, or stalls, and when the peer closes.
        """
        start = bytearray(4)
        if idle:
            self._await_first(start)
        else:
            self.receive_into([memoryview(start)])
        (length,) = struct.unpack(">I", start)
        if not 0 < length <= limit:
            raise ConnectionError(f"a header of {length} bytes, must have 1 to {limit}")
        header = bytearray(length)
        self.receive_into([memoryview(header)])
        try:
            return decode(bytes(header))
        except ValueError as error:  # msgspec's errors are among them
            raise ConnectionError(f"a header that cannot be read: {error}") from None

    def receive_into(self, buffers: Sequence[memoryview]) -> None:
        """Fill buffers. Raises ConnectionError if the peer stalls or is gone before that."""
        self._move(self._read, buffers)

    def abort(self) -> None:
        """Wake up whoever reads or writes, with an error. The descriptor stays, so that nobody gets another's."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back."""
        self.abort()
        self._socket.close()

    def _await_first(self, start: bytearray) -> None:
        while True:
            try:
                count = self._socket.recv_into(memoryview(start), 4)
            except BlockingIOError:  # the timeout, and not a byte so far: nobody is late
                continue
            except OSError as error:
                raise ConnectionError(str(error)) from None
            if not count:
                raise ConnectionError("the peer closed the connection")
            self.receive_into([memoryview(start)[count:]])
            return

    def _read(self, buffers: Sequence[memoryview | bytes]) -> int:
        count = self._socket.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
        if not count:
            raise ConnectionError("the peer closed the connection")
        return count

    def _write(self, buffers: Sequence[memoryview | bytes]) -> int:
        return self._socket.sendmsg(buffers)

    def _move(self, move: Callable[[Sequence[memoryview | bytes]], int], buffers: Sequence[memoryview | bytes]) -> None:
        """Until all buffers are through; a call moves what the kernel takes."""
        left = [memoryview(buffer) for buffer in buffers if len(buffer)]
        at = 0
        while at < len(left):
            try:
                count = move(left[at : at + BUFFERS_AT_ONCE])
            except BlockingIOError:
                raise ConnectionError("the peer stalled") from None
            except ConnectionError:
                raise
            except OSError as error:
                raise ConnectionError(str(error)) from None
            while count and count >= len(left[at]):
                count -= len(left[at])
                at += 1
            if count:
                left[at] = left[at][count:]
