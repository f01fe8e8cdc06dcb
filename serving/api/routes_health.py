"""How it is: alive, ready, busy. And the numbers, for Prometheus and for people."""

import asyncio
from typing import Any

from litestar import Request, get
from litestar.types import ASGIApp

from dispec.engine.process.messages import Inspection
from dispec.serving.api.openapi import describe
from dispec.serving.api.service import service_of
from dispec.serving.api.streaming import JsonAnswer
from dispec.serving.client.errors import EngineDied, NotReady
from dispec.serving.http.errors import ApiError

_INSPECTION_SECONDS = 2.0  # an engine that does not answer has other troubles, which /health tells of


@get("/health", **describe(None, None, tag="Monitoring"))
async def health(request: Request) -> ASGIApp:
    """Ready: 200, or 503 and why not. It follows the engine's steps, so that an engine that hangs is not ready."""
    is_ready, why = service_of(request).client.is_ready()
    if not is_ready:
        raise ApiError(503, why, code="not_ready", retry_after=5)
    return JsonAnswer({"status": "ready"})


@get(["/live", "/ping"], **describe(None, None, tag="Monitoring", needs_key=False))
async def live(request: Request) -> ASGIApp:
    """Alive: 200 as long as starting this server again would help nobody. Open without a key."""
    state = service_of(request).client.state
    return JsonAnswer({"status": "dead" if state == "dead" else "alive"}, 503 if state == "dead" else 200)


@get("/load", **describe(None, None, tag="Monitoring"))
async def load(request: Request) -> ASGIApp:
    """How many choices are running and waiting."""
    client = service_of(request).client
    running, waiting = client.num_running, client.num_waiting
    return JsonAnswer({"server_load": running + waiting, "running": running, "waiting": waiting})


@get("/stats", **describe(None, None, tag="Monitoring"))
async def stats(request: Request) -> ASGIApp:
    """The front's numbers, and the engine's books as they were between two steps: null if it does not answer."""
    service = service_of(request)
    client = service.client
    found: dict[str, Any] = {
        "state": client.state,
        "uptime_seconds": round(service.uptime_seconds, 3),
        "requests": client.load,
        "running": client.num_running,
        "waiting": client.num_waiting,
        "engine": None,
    }
    try:
        books: Inspection = await asyncio.wait_for(client.inspect(), _INSPECTION_SECONDS)
    except (TimeoutError, NotReady, EngineDied):
        pass
    else:
        found["engine"] = {
            "running": books.num_running,
            "waiting": books.num_waiting,
            "used_blocks": books.num_used_blocks,
            "cached_blocks": books.num_cached_blocks,
            "blocks": books.num_blocks,
            "problem": books.problem,
        }
    return JsonAnswer(found)


@get("/metrics", **describe(None, None, tag="Monitoring", media_type="text/plain"))
async def metrics(request: Request) -> ASGIApp:
    """Prometheus's text format."""
    return _Text(request.app.state["metrics"].render())


class _Text:
    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [
            (b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),
            (b"content-length", str(len(self._body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self._body, "more_body": False})
