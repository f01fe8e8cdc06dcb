"""GET /health, /live, /ping, /load, /stats and /metrics."""

import asyncio
from typing import Any

from litestar import Request, get
from litestar.types import ASGIApp

from dispec.engine.process.messages import Inspection
from dispec.serving.api.context import context_of
from dispec.serving.api.http_responses import BytesResponse, JsonResponse
from dispec.serving.api.openapi import describe
from dispec.serving.client.errors import EngineDied, NotReady

_INSPECTION_SECONDS = 2.0  # /health tells why an engine does not answer


@get("/health", **describe(None, None, tag="Monitoring", needs_key=False))
async def health(request: Request) -> ASGIApp:
    """Ready: 200, or 503 and the reason. Open without a key. An engine with work that ends no step is not ready."""
    is_ready, why = context_of(request).client.is_ready()
    if not is_ready:
        raise NotReady(why)
    return JsonResponse({"status": "ready"})


@get(["/live", "/ping"], **describe(None, None, tag="Monitoring", needs_key=False))
async def live(request: Request) -> ASGIApp:
    """Alive: 200, or 503 if the server must be started again. Open without a key."""
    state = context_of(request).client.state
    return JsonResponse({"status": "dead" if state == "dead" else "alive"}, 503 if state == "dead" else 200)


@get("/load", **describe(None, None, tag="Monitoring"))
async def load(request: Request) -> ASGIApp:
    """The number of choices that run and wait."""
    client = context_of(request).client
    running, waiting = client.num_running, client.num_waiting
    return JsonResponse({"server_load": running + waiting, "running": running, "waiting": waiting})


@get("/stats", **describe(None, None, tag="Monitoring"))
async def stats(request: Request) -> ASGIApp:
    """The server's numbers, and the engine's as of the end of a step: null if the engine does not answer."""
    context = context_of(request)
    client = context.client
    found: dict[str, Any] = {
        "state": client.state,
        "uptime_seconds": round(context.uptime_seconds, 3),
        "requests": client.load,
        "running": client.num_running,
        "waiting": client.num_waiting,
        "engine": None,
    }
    try:
        inspection: Inspection = await asyncio.wait_for(client.inspect(), _INSPECTION_SECONDS)
    except (TimeoutError, NotReady, EngineDied):
        pass
    else:
        found["engine"] = {
            "running": inspection.num_running,
            "waiting": inspection.num_waiting,
            "used_blocks": inspection.num_used_blocks,
            "cached_blocks": inspection.num_cached_blocks,
            "blocks": inspection.num_blocks,
            "problem": inspection.problem,
        }
    return JsonResponse(found)


@get("/metrics", **describe(None, None, tag="Monitoring", media_type="text/plain"))
async def metrics(request: Request) -> ASGIApp:
    """The metrics in Prometheus's text format."""
    return BytesResponse(request.app.state["metrics"].render(), b"text/plain; version=0.0.4; charset=utf-8")
