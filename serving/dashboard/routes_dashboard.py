"""The routes of the dashboard: its page, the page's files, and its events."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.exceptions import NotFoundException
from litestar.params import FromPath, JSONBody
from litestar.response import Stream

from dispec.serving.client.engine_client import EngineClient
from dispec.serving.dashboard.dashboard_events import dashboard_events
from dispec.serving.dashboard.dashboard_state import DashboardState
from dispec.serving.dashboard.engine_usage import EngineUsage
from dispec.serving.dashboard.markdown_process import MAX_TEXT, MarkdownProcess
from dispec.serving.dashboard.time_buckets import RANGES
from dispec.serving.http.errors import ApiError
from dispec.serving.http.web_assets import INSTALL, plotly_script

_DIRECTORY = Path(__file__).parent / "page"
_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
_FILES = frozenset(path.name for path in _DIRECTORY.iterdir()) - {"index.html"}
_MAX_MARKDOWN_BYTES = 2**20
_HEADERS = {
    # Text from a model can make the page load or send nothing elsewhere. Plotly sets styles.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class MarkdownText(msgspec.Struct):
    text: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]


@cache
def _gzipped(path: Path) -> bytes:
    return gzip.compress(path.read_bytes(), compresslevel=6)


def dashboard_router(client: EngineClient) -> Router:
    """Return the routes below /dashboard."""
    state, usage, renderer = DashboardState(client), EngineUsage(client), MarkdownProcess()

    @get("/", sync_to_thread=False)
    def page() -> Response[bytes]:
        return _file(_DIRECTORY / "index.html")

    @get("/{name:str}", sync_to_thread=False)
    def asset(name: FromPath[str]) -> Response[bytes]:
        if name not in _FILES:
            raise NotFoundException(f"there is no {name}")
        return _file(_DIRECTORY / name)

    @get("/plotly.js")
    async def plotly(request: Request) -> Response[bytes]:
        path = plotly_script()
        if path is None:
            raise ApiError(404, f"the charts need Plotly: {INSTALL}")
        headers = _HEADERS | {"Cache-Control": "private, max-age=86400", "Vary": "Accept-Encoding"}
        if "gzip" not in request.headers.get("accept-encoding", ""):
            content = await asyncio.to_thread(path.read_bytes)
        else:
            content = await asyncio.to_thread(_gzipped, path)
            headers["Content-Encoding"] = "gzip"
        return Response(content, media_type=_TYPES["js"], headers=headers)

    @get("/events")
    async def events(request: Request) -> Stream:
        name = request.query_params.get("range", "1m")
        if name not in RANGES:
            raise ApiError(400, f"range is {name!r:.100}, must be one of {', '.join(RANGES)}", param="range")

        async def encoded() -> AsyncIterator[bytes]:
            async for event in dashboard_events(client, state, usage, name):
                yield b"data: " + msgspec.json.encode(event) + b"\n\n"

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return Stream(encoded(), media_type="text/event-stream", headers=headers)

    @post("/markdown", status_code=200, request_max_body_size=_MAX_MARKDOWN_BYTES)
    async def markdown(data: JSONBody[MarkdownText]) -> Response[bytes]:
        """Return the HTML of each block of a text, as `serving.dashboard.markdown` makes it."""
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return Response(await renderer.render(data.text), media_type="application/json", headers=headers)

    return Router("/dashboard", route_handlers=[page, asset, plotly, events, markdown], include_in_schema=False)


def _file(path: Path) -> Response[bytes]:
    return Response(path.read_bytes(), media_type=_TYPES[path.suffix[1:]], headers=_HEADERS)
