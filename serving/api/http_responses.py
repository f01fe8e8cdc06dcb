"""Responses as ASGI applications: JSON, and server-sent events. Both abort the work if the client disconnects."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
from litestar.types import Receive, Scope, Send

from dispec.serving.http.errors import CLIENT_LEFT, ApiError, ClientLeft, log_error, to_api_error

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode

_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # else nginx collects tokens
]


class Work(Protocol):
    """The work behind a response: a `Generation`, or what an API makes of one."""

    async def accepted(self) -> None:
        """Wait until the engine has queued the work. Raises the engine's refusal."""

    def abort(self) -> None:
        """End the work, unless it has ended."""

    def log_fields(self) -> dict[str, Any]:
        """Return the fields of the access log."""


def event(data: Any, name: bytes = b"") -> bytes:
    """Return a server-sent event with JSON; OpenAI's have no name."""
    return (b"event: " + name + b"\n" if name else b"") + b"data: " + _encode(data) + b"\n\n"


class StreamForm(NamedTuple):
    """What an API sends in a stream beside its events.

    end: after the last event. keep_alive: in a silent stream. error: the event instead of the end, after an error.
    """

    end: bytes
    keep_alive: bytes
    error: Callable[[ApiError, Scope], bytes]


OPENAI_STREAM = StreamForm(
    end=b"data: [DONE]\n\n",
    keep_alive=b": keep-alive\n\n",
    error=lambda error, scope: event(msgspec.Raw(error.body(scope))),
)


class BytesResponse:
    """An ASGI response with a body that is encoded already."""

    def __init__(self, body: bytes, media_type: bytes, status: int = 200) -> None:
        self._body = body
        self._media_type = media_type
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", self._media_type), (b"content-length", str(len(self._body)).encode())]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": self._body, "more_body": False})


class JsonResponse(BytesResponse):
    """An ASGI response with JSON. msgspec writes no NaN."""

    def __init__(self, body: Any, status: int = 200) -> None:
        super().__init__(body if isinstance(body, bytes) else _encode(body), b"application/json", status)


async def abort_on_disconnect(scope: Scope, receive: Receive, work: Work, result: Awaitable[T]) -> T:
    """Return the result of the work. If the client disconnects, abort the work and raise ClientLeft."""
    with _watching(receive, work.abort) as has_left:
        try:
            found = await result
        except Exception:
            if has_left():
                raise _left(scope) from None
            raise
        finally:
            work.abort()
            _add_log_fields(scope, work)
    if has_left():
        raise _left(scope)
    return found


class EventStream:
    """An ASGI response of server-sent events.

    It begins when the engine has queued the work, so that a refusal has its own status. A later error is an
    event. After `keep_alive_seconds` without an event, `form.keep_alive` is sent.
    """

    def __init__(
        self,
        work: Work,
        events: AsyncIterator[bytes],
        keep_alive_seconds: float,
        form: StreamForm = OPENAI_STREAM,
    ) -> None:
        self._work = work
        self._events = events
        self._keep_alive_seconds = keep_alive_seconds
        self._form = form
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._work
        with _watching(receive, work.abort) as has_left:
            keep_alive: asyncio.Task[None] | None = None
            try:
                await work.accepted()
                if has_left():
                    raise _left(scope)
                await send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_HEADERS)})
                self._last_sent = time.monotonic()
                keep_alive = asyncio.create_task(self._send_keep_alives(send))
                last = await self._send_events(scope, send, has_left)
                keep_alive.cancel()
                await send({"type": "http.response.body", "body": last, "more_body": False})
            finally:
                if keep_alive is not None:
                    keep_alive.cancel()
                work.abort()
                _add_log_fields(scope, work)
                if has_left():
                    scope["state"]["status"] = CLIENT_LEFT

    async def _send_events(self, scope: Scope, send: Send, has_left: Callable[[], bool]) -> bytes:
        """Send all events but the last, and return that: the end, or an error."""
        try:
            async for data in self._events:
                if has_left():
                    return b""
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            if has_left():
                return b""
            found = to_api_error(error)
            log_error(scope, found, error)
            return self._form.error(found, scope)
        return self._form.end

    async def _send_keep_alives(self, send: Send) -> None:
        while True:
            silent = time.monotonic() - self._last_sent
            if silent >= self._keep_alive_seconds:
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": self._form.keep_alive, "more_body": True})
                silent = 0.0
            await asyncio.sleep(self._keep_alive_seconds - silent)


def _add_log_fields(scope: Scope, work: Work) -> None:
    scope["state"].setdefault("log", {}).update(work.log_fields())


def _left(scope: Scope) -> ClientLeft:
    scope["state"]["status"] = CLIENT_LEFT
    return ClientLeft()


@contextmanager
def _watching(receive: Receive, on_leave: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Call `on_leave` if the client disconnects; yields a function that tells whether it has.

    The body must have been read.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    def left(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            on_leave()

    task = asyncio.create_task(watch())
    task.add_done_callback(left)
    try:
        yield task.done
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            task.cancel()
