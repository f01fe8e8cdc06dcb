"""Answers on the wire: whole ones and server-sent events, both given up the moment that nobody reads them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from litestar.types import Receive, Scope, Send

from dispec.serving.api.call import Call
from dispec.serving.http.errors import CLIENT_LEFT, ClientLeft, as_api_error, log

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise collect tokens
]


def event(data: Any) -> bytes:
    return b"data: " + _encode(data) + b"\n\n"


class JsonAnswer:
    """An ASGI response. Encoding is msgspec's, in which no NaN exists."""

    def __init__(self, body: Any, status: int = 200) -> None:
        self._body = body if isinstance(body, bytes) else _encode(body)
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(self._body)).encode())]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": self._body, "more_body": False})


async def unless_client_leaves(scope: Scope, receive: Receive, call: Call, work: Awaitable[T]) -> T:
    """The work's result; if the client leaves, the call is aborted, the work ends, and ClientLeft is raised."""
    with _watching(receive, call.abort) as has_left:
        try:
            result = await work
        except Exception:
            if has_left():
                raise _left(scope) from None
            raise
        finally:
            call.abort()
            note(scope, call)
    if has_left():
        raise _left(scope)
    return result


class EventStream:
    """An ASGI response of server-sent events, begun when the engine has taken the call, so that a refusal still has
    its own status. An error after that is an event of its own. Silence is broken by comments.
    """

    def __init__(self, call: Call, events: AsyncIterator[bytes], keep_alive: float) -> None:
        self._call = call
        self._events = events
        self._keep_alive = keep_alive
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call
        with _watching(receive, call.abort) as has_left:
            comments: asyncio.Task[None] | None = None
            try:
                await call.accepted()
                if has_left():
                    raise _left(scope)
                await send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_HEADERS)})
                self._last_sent = time.monotonic()
                comments = asyncio.create_task(self._comment(send))
                last = await self._send_events(scope, send, has_left)
                comments.cancel()
                await send({"type": "http.response.body", "body": last, "more_body": False})
            finally:
                if comments is not None:
                    comments.cancel()
                call.abort()
                note(scope, call)
                if has_left():
                    scope["state"]["status"] = CLIENT_LEFT

    async def _send_events(self, scope: Scope, send: Send, has_left: Callable[[], bool]) -> bytes:
        """Sends all but the last, which it returns: the end, or an error."""
        try:
            async for data in self._events:
                if has_left():
                    return b""
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            if has_left():
                return b""
            told = as_api_error(error)
            scope["state"].setdefault("log", {})["error"] = told.detail.message
            if told.status == 500:
                log.error("%s", told.detail.message, exc_info=error, extra={"request_id": scope["state"]["request_id"]})
            return b"data: " + told.body() + b"\n\n"
        return DONE

    async def _comment(self, send: Send) -> None:
        while True:
            silent = time.monotonic() - self._last_sent
            if silent >= self._keep_alive:
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})
                silent = 0.0
            await asyncio.sleep(self._keep_alive - silent)


def note(scope: Scope, call: Call) -> None:
    """What the log shall say about the call."""
    scope["state"].setdefault("log", {}).update(call.log_fields())


def _left(scope: Scope) -> ClientLeft:
    scope["state"]["status"] = CLIENT_LEFT
    return ClientLeft()


@contextmanager
def _watching(receive: Receive, on_leave: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Calls back if the client leaves; gives a function that tells whether it has. The body must have been read."""

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
