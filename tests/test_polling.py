"""What is asked all the time: it fills no log, and its numbers do not follow the wall clock."""

import asyncio
import logging
import time
from typing import Any

import pytest
from litestar.testing import TestClient

from dispec.serving.api.app import create_app
from dispec.serving.client.process_client import ProcessClient
from dispec.serving.http.auth import Keys
from dispec.serving.http.middleware import Middleware
from dispec.serving.observability.metrics import Metrics
from dispec.serving.settings import ServerSettings


class Site:
    """A gate before an application that answers what the test says, and the lines that its log has got."""

    def __init__(self, caplog: pytest.LogCaptureFixture, keys: tuple[str, ...] = ()) -> None:
        caplog.set_level(logging.INFO, "dispec.access")
        self.now, self.status = 0.0, 200
        self._caplog = caplog
        self._middleware = Middleware(self._answer, Keys(keys), 10_000, clock=lambda: self.now)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def ask(self, path: str, times: int = 1) -> None:
        async def send(message: Any) -> None:
            pass

        for _ in range(times):
            scope: Any = {"type": "http", "method": "GET", "path": path, "headers": []}
            asyncio.run(self._middleware(scope, send, send))

    def told(self) -> list[tuple[str, int]]:
        """Path and status of each line since the last call."""
        found = [(record.fields["path"], record.fields["status"]) for record in self._caplog.records]  # type: ignore[attr-defined]
        self._caplog.clear()
        return found


@pytest.mark.parametrize("path", ["/health", "/live", "/ping", "/metrics", "/load", "/stats"])
def test_polling_is_not_logged(caplog: pytest.LogCaptureFixture, path: str) -> None:
    site = Site(caplog)
    site.ask(path, times=50)
    assert site.told() == []
    site.status = 503
    site.ask(path, times=50)  # as while a model is loaded, or an engine is started again
    assert site.told() == [(path, 503)]
    site.now = 59.0
    site.ask(path)
    assert site.told() == []
    site.now = 60.0
    site.ask(path, times=50)
    assert site.told() == [(path, 503)]
    site.status = 500  # another failure is news
    site.ask(path, times=50)
    assert site.told() == [(path, 500)]


def test_repeated_failures_of_polling_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    site = Site(caplog, keys=("a-key",))
    site.ask("/metrics", times=50)
    assert site.told() == [("/metrics", 401)]


def test_requests_are_logged_each(caplog: pytest.LogCaptureFixture) -> None:
    site = Site(caplog)
    site.ask("/v1/completions", times=3)
    site.status = 503
    site.ask("/v1/completions", times=3)
    assert site.told() == [("/v1/completions", 200)] * 3 + [("/v1/completions", 503)] * 3


def test_uptime_does_not_follow_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ProcessClient({}, max_queued_requests=1, max_queued_tokens=1, stall_seconds=1)  # never started
    with TestClient(create_app(client, ServerSettings(), Metrics("tiny"))) as http:
        real, monotonic = time.time(), time.monotonic()
        for shift in (-1e6, 1e6):
            monkeypatch.setattr(time, "time", lambda shift=shift: real + shift)
            assert 0 <= http.get("/stats").json()["uptime_seconds"] <= time.monotonic() - monotonic + 60
