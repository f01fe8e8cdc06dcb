"""Accepts connections, and answers 503 to those for which no file descriptor is left.

libuv, below uvloop, closes such connections without a response. Here the last descriptors of the process are reserved:
connections that get one are refused, a few at a time, while the others wait in the listener's backlog.
"""

import asyncio
import contextlib
import errno
import logging
import math
import resource
import socket
from collections.abc import Callable
from typing import cast

from dispec.serving.http.errors import ApiError
from dispec.serving.http.http_protocol import closing_response

log = logging.getLogger("dispec.server")

_MAX_ACCEPTED = 128  # connections before other events have their turn
_PAUSE_SECONDS = 0.1  # when no descriptor is left even for refusals
_REQUEST_SECONDS = 2.0  # that a refused client has to begin its request
_CLOSE_SECONDS = 0.25  # that it has to send the rest and to close
_LOG_SECONDS = 10.0  # between two lines about refusals
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LIMITS = (2**20, 2**16, 10240)  # tried where the hard limit is not granted, as on macOS


def raise_file_limit() -> int:
    """Raise the limit of open files of this process and its children; return it."""
    current = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in current)
    for limit in (hard, *_LIMITS):
        if soft < limit <= hard:
            wanted = resource.RLIM_INFINITY if limit == math.inf else int(limit)
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, current[1]))
                soft = limit
                break
    return int(min(soft, 2**31))


def num_reserved(file_limit: int) -> int:
    """Return the number of descriptors that no request gets: half for refusals, half for the server's own files."""
    return min(64, max(16, file_limit // 8))


class Acceptor:
    """Serves the connections of a listener with a protocol, from its creation until `close`.

    It has the methods of `asyncio.Server` that uvicorn calls. file_limit: open files that this process may have.
    """

    def __init__(self, listener: socket.socket, protocol: Callable[[], asyncio.Protocol], file_limit: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._protocol = protocol
        # A new descriptor is the lowest free number, so that a high one means that all below are taken.
        self._first_reserved = file_limit - num_reserved(file_limit)
        self._most_refusals = num_reserved(file_limit) // 2
        self._refusals: set[_Refusal] = set()
        self._starting: set[asyncio.Task[None]] = set()
        self._num_unlogged = 0  # refused since the last line in the log
        self._is_logging = self._is_listening = self._is_closed = False
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Accept no more connections. Those that are served go on."""
        self._is_closed = True
        self._stop_listening()
        for refusal in list(self._refusals):
            refusal.abort()

    async def wait_closed(self) -> None:
        """Return at once: `close` leaves nothing to wait for."""

    def _listen(self) -> None:
        if not self._is_listening and not self._is_closed:
            self._is_listening = True
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _stop_listening(self) -> None:
        if self._is_listening:
            self._is_listening = False
            self._loop.remove_reader(self._listener.fileno())

    def _accept(self) -> None:
        for _ in range(_MAX_ACCEPTED):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:  # the client left while it waited
                continue
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    log.warning("a connection could not be accepted: %s", error)
                self._stop_listening()
                self._loop.call_later(_PAUSE_SECONDS, self._listen)
                return
            connection.setblocking(False)
            if connection.fileno() < self._first_reserved:
                self._begin(connection, self._protocol)
                continue
            self._num_unlogged += 1
            self._log_refusals()
            refusal = _Refusal(self._refused)
            self._refusals.add(refusal)
            self._begin(connection, lambda refusal=refusal: refusal)  # type: ignore[misc]
            if len(self._refusals) >= self._most_refusals:
                self._stop_listening()
                return

    def _begin(self, connection: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        task = self._loop.create_task(self._connect(connection, protocol))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _connect(self, connection: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(protocol, connection)
        except OSError:  # the client has gone already
            connection.close()

    def _refused(self, refusal: "_Refusal") -> None:
        self._refusals.discard(refusal)
        if len(self._refusals) < self._most_refusals:
            self._listen()

    def _log_refusals(self) -> None:
        """Log at once that connections are refused, and their number every few seconds after that."""
        if self._is_logging or not self._num_unlogged:
            return
        log.warning(
            "connections refused with 503: %d; this process may open no more files (see `ulimit -n`)",
            self._num_unlogged,
        )
        self._num_unlogged = 0
        self._is_logging = True
        self._loop.call_later(_LOG_SECONDS, self._log_again)

    def _log_again(self) -> None:
        self._is_logging = False
        self._log_refusals()


class _Refusal(asyncio.Protocol):
    """Answers a request with 503, and closes when the client does or takes too long."""

    def __init__(self, on_end: Callable[["_Refusal"], None]) -> None:
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._has_answered = False
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(_REQUEST_SECONDS, self._answer)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has another class

    def data_received(self, data: bytes) -> None:
        """Answer at the first bytes. The others are read too: closing with unread bytes discards the response."""
        if not self._has_answered:
            self._answer()

    def _answer(self) -> None:
        if self._transport is None or self._transport.is_closing():
            self.abort()
            return
        self._has_answered = True
        why = "the server has no file descriptor left for this connection"
        self._transport.write(closing_response(ApiError(503, why, code="overloaded", retry_after=1)))
        self._transport.write_eof()
        self._timer.cancel()
        self._timer = self._loop.call_later(_CLOSE_SECONDS, self.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._on_end(self)

    def abort(self) -> None:
        self._timer.cancel()
        if self._transport is None:  # it was lost before it was made
            self._on_end(self)
        else:
            self._transport.close()
