"""ASGI middleware around the application, for unknown routes too: request ids, keys, CORS, the access log, and HEAD."""

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

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

from dispec.serving.http.auth import Keys
from dispec.serving.http.cors import NO_ORIGINS, Cors, Header
from dispec.serving.http.errors import CLIENT_LEFT, ApiError

log = logging.getLogger("dispec.access")

MAX_REQUEST_ID = 128  # characters
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,%d}" % MAX_REQUEST_ID)  # safe in headers and logs
_POLLED_PATHS = frozenset({"/live", "/ping", "/health", "/metrics", "/load", "/stats", "/dashboard/markdown"})
_REPEAT_SECONDS = 60.0  # between two lines about the same failure of a polled path


class Middleware:
    """Gives each request an id, checks keys and origins, and writes the access log."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        max_header_bytes: int,
        *,
        cors: Cors = NO_ORIGINS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: seconds, for failures that are logged once a minute."""
        self._app = app
        self._keys = keys
        self._cors = cors
        self._max_header_bytes = max_header_bytes
        self._clock = clock
        self._last_logged: dict[tuple[str, int], float] = {}  # by polled path and status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        started = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status = CLIENT_LEFT  # unless there is a response

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status == 405 or method == "OPTIONS":
                    _allow_head(message)
                of_origin = self._cors.response_headers(headers.get(b"origin"))
                request_id = state["request_id"].encode()
                # Anthropic's clients read the second name.
                added = [(b"x-request-id", request_id), (b"request-id", request_id), *of_origin]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        try:
            # A preflight carries no key: its response tells the server's CORS options alone.
            preflight = self._cors.preflight_headers(method, headers)
            refusal = self._refusal(method, path, headers)
            if preflight is not None:
                await _respond(204, preflight, b"", send_with_id)
            elif refusal is not None:
                await _refuse(refusal, scope, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        finally:
            self._log(method, path, state, status, time.perf_counter() - started)

    def _log(self, method: str, path: str, state: dict[str, Any], status: int, seconds: float) -> None:
        level = self._level(path, status)
        if log.isEnabledFor(level):
            fields = {
                "request_id": state["request_id"],
                "method": method,
                "path": path,
                "status": state.get("status", status),
                "seconds": round(seconds, 6),
                **state.get("log", {}),
            }
            log.log(level, "request", extra={"fields": fields})

    def _level(self, path: str, status: int) -> int:
        """Return the level of a request's line: successful polling is not logged, and failing once a minute."""
        if path not in _POLLED_PATHS:
            return logging.INFO
        now = self._clock()
        if status < 400 or now - self._last_logged.get((path, status), -math.inf) < _REPEAT_SECONDS:
            return logging.DEBUG
        self._last_logged[path, status] = now
        return logging.INFO

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if not self._keys.allow(path, headers.get(b"authorization"), headers.get(b"x-api-key")):
            challenge = {"WWW-Authenticate": self._keys.challenge(path)}
            is_given = b"authorization" in headers or b"x-api-key" in headers
            said = "this API key is not known" if is_given else "an API key is needed"
            how = "send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
            return ApiError(401, f"{said}: {how}", headers=challenge)
        size = sum(len(name) + len(value) + 4 for name, value in headers.items())
        if size > self._max_header_bytes:  # `BoundedHttp` counts only headers that come in several packets
            return ApiError(431, f"the headers hold {size} bytes, must be at most {self._max_header_bytes}")
        is_cross_site = headers.get(b"sec-fetch-site") == b"cross-site"
        if method == "POST" and is_cross_site and not self._cors.allows(headers.get(b"origin")):
            # A page of any site can make a browser send requests here, with the key if the browser keeps it.
            return ApiError(403, "pages of other sites may not use this server: --allowed-origins names those that may")
        return None


class HeadMiddleware:
    """Answers HEAD as GET, with the same status and headers and without the body."""

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
            # A stream may have no end, and so ends with a disconnect after its headers.
            await has_started.wait()
            return {"type": "http.disconnect"}

        async def send_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                has_started.set()

        await self._app({**scope, "method": "GET"}, receive_nothing, send_headers)


def _allow_head(message: HTTPResponseStartEvent) -> None:
    """Add HEAD to an `Allow` header that has GET."""
    message["headers"] = [
        (name, value + b", HEAD" if name.lower() == b"allow" and b"GET" in value.split(b", ") else value)
        for name, value in message["headers"]
    ]


async def _refuse(error: ApiError, scope: Scope, send: Send) -> None:
    body = error.body(scope)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await _respond(error.status, headers, body, send)


async def _respond(status: int, headers: list[Header], body: bytes, send: Send) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
