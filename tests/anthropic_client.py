"""Anthropic's client on the application of a scripted engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from anthropic import Anthropic

from tests.scripted_engine import ScriptedEngine, scripted_server

_OF_THE_BODY = ("content-length", "content-encoding", "transfer-encoding")


@contextmanager
def anthropic_client(
    engine: ScriptedEngine, api_key: str = "any", *, keys: tuple[str, ...] = (), **settings: Any
) -> Iterator[Anthropic]:
    """Yield a client without retries. keys: the server's."""
    with scripted_server(engine, api_key=keys, **settings) as http:

        def answer(request: httpx2.Request) -> httpx2.Response:
            path = request.url.raw_path.decode()
            found = http.request(request.method, path, content=request.read(), headers=dict(request.headers))
            headers = {name: value for name, value in found.headers.items() if name not in _OF_THE_BODY}
            return httpx2.Response(found.status_code, headers=headers, content=found.content)

        transport = httpx2.Client(transport=httpx2.MockTransport(answer))
        yield Anthropic(base_url="http://testserver", api_key=api_key, max_retries=0, http_client=transport)
