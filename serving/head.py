"""HEAD on every route that has GET: the same status and headers, without the body."""

import asyncio

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPReceiveMessage, HTTPRequestEvent, Message, Receive, Scope, Send


class HeadAsGet:
    """ASGI middleware that has a HEAD request answered as GET, and ends the answer behind its headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [_with_head(name, value) for name, value in message["headers"]]
            await send(message)

        if scope["method"] != "HEAD":
            await self._app(scope, receive, send_allowed)
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
                await send_allowed(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                has_started.set()

        await self._app({**scope, "method": "GET"}, receive_nothing, send_headers)


def _with_head(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """A header as it is; in `Allow`, HEAD beside GET."""
    if name.lower() != b"allow":
        return name, value
    methods = {method.strip() for method in value.split(b",")}
    return name, b", ".join(sorted(methods | {b"HEAD"} if b"GET" in methods else methods))
