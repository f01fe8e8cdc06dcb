"""HEAD on every route that has GET: the same status and headers, without the body."""

import asyncio

from litestar.enums import ScopeType
from litestar.types import (
    ASGIApp,
    HTTPReceiveMessage,
    HTTPRequestEvent,
    HTTPResponseStartEvent,
    Message,
    Receive,
    Scope,
    Send,
)


class HeadAsGet:
    """ASGI middleware that has a HEAD request answered as GET, and ends the answer behind its headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        requests: list[HTTPRequestEvent] = [{"type": "http.request", "body": b"", "more_body": False}]
        has_started = asyncio.Event()

        async def receive_nothing() -> HTTPReceiveMessage:
            if requests:
                return requests.pop()
            # To a route that streams, the client leaves when it has the headers: a stream may have no end.
            await has_started.wait()
            return {"type": "http.disconnect"}

        async def send_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                has_started.set()

        await self._app({**scope, "method": "GET"}, receive_nothing, send_headers)


def allow_head(message: HTTPResponseStartEvent) -> None:
    """In the `Allow` header of an answer, name HEAD beside GET."""
    message["headers"] = [
        (name, value + b", HEAD" if name.lower() == b"allow" and b"GET" in value.split(b", ") else value)
        for name, value in message["headers"]
    ]
