"""What every request passes, even one to an unknown route: its id, the key, the rules for pages of other origins, and a
line in the log when it is over.
"""

import logging
import math
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPResponseStartEvent, Message, Receive, Scope, Send

from dispec.serving.http.auth import Keys
from dispec.serving.http.cors import NO_ORIGINS, Cors, Header
from dispec.serving.http.errors import CLIENT_LEFT, ApiError
from dispec.serving.http.head import allow_head

log = logging.getLogger("dispec.access")

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")  # goes into headers and logs as it is
_QUIET_PATHS = frozenset({"/live", "/ping", "/health", "/metrics", "/load", "/stats"})  # polled all the time
_QUIET_SECONDS = 60.0  # between two lines about the same failure of such a path


class Middleware:
    """ASGI middleware around the whole application. clock: seconds, for what is logged once in a while."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        max_header_bytes: int,
        *,
        cors: Cors = NO_ORIGINS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._keys = keys
        self._cors = cors
        self._max_header_bytes = max_header_bytes
        self._clock = clock
        self._last_told: dict[tuple[str, int], float] = {}  # of a quiet path and its status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status = CLIENT_LEFT  # unless there is an answer

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status == 405 or scope["method"] == "OPTIONS":
                    allow_head(message)
                of_origin = self._cors.of_answer(headers.get(b"origin"))
                _add_headers(message, [(b"x-request-id", state["request_id"].encode()), *of_origin])
            await send(message)

        try:
            # A preflight carries no key: its answer tells of the server's options and of nothing else.
            preflight = self._cors.of_preflight(scope["method"], headers)
            refusal = self._refusal(scope["method"], scope["path"], headers)
            if preflight is not None:
                await _answer(204, preflight, b"", send_with_id)
            elif refusal is not None:
                await _refuse(refusal, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        finally:
            path = scope["path"]
            level = self._level(path, status)
            if log.isEnabledFor(level):
                fields = {
                    "request_id": state["request_id"],
                    "method": scope["method"],
                    "path": path,
                    "status": state.get("status", status),
                    "seconds": round(time.perf_counter() - started, 6),
                    **state.get("log", {}),
                }
                log.log(level, "request", extra={"fields": fields})

    def _level(self, path: str, status: int) -> int:
        """Of the line about a request: answers to polling fill no log, and its failures are told once a minute."""
        if path not in _QUIET_PATHS:
            return logging.INFO
        now = self._clock()
        if status < 400 or now - self._last_told.get((path, status), -math.inf) < _QUIET_SECONDS:
            return logging.DEBUG
        self._last_told[path, status] = now
        return logging.INFO

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if not self._keys.allow(path, headers.get(b"authorization")):
            challenge = {"WWW-Authenticate": self._keys.challenge(path)}
            said = "this API key is not known" if b"authorization" in headers else "an API key is needed"
            return ApiError(401, f"{said}: send it as `Authorization: Bearer KEY`", headers=challenge)
        size = sum(len(name) + len(value) + 4 for name, value in headers.items())
        if size > self._max_header_bytes:  # uvicorn looks only where they come in several pieces
            return ApiError(431, f"the headers hold {size} bytes, must be at most {self._max_header_bytes}")
        is_cross_site = headers.get(b"sec-fetch-site") == b"cross-site"
        if method == "POST" and is_cross_site and not self._cors.allows(headers.get(b"origin")):
            # A browser that can reach this server, and may know its key, sends what pages of any site make it send.
            return ApiError(403, "pages of other sites may not use this server: --allowed-origins names those that may")
        return None


async def _refuse(error: ApiError, send: Send) -> None:
    body = error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await _answer(error.status, headers, body, send)


async def _answer(status: int, headers: list[Header], body: bytes, send: Send) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _add_headers(message: HTTPResponseStartEvent, headers: list[Header]) -> None:
    message["headers"] = [*message["headers"], *headers]
