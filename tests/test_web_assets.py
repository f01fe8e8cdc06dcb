"""A server without the extra `serve` answers the API, and its pages name the extra."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from litestar.testing import TestClient

from dispec.serving import server
from dispec.serving.api.app import create_app
from dispec.serving.dashboard.routes_dashboard import dashboard_router
from dispec.serving.http import web_assets
from dispec.serving.observability.metrics import Metrics
from dispec.serving.settings import ServerSettings
from tests.checkpoints import tiny_tokenizer
from tests.scripted_engine import ScriptedEngine, Tokenizer

INSTALL = 'pip install "dispec[serve]"'


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(Tokenizer(tiny_tokenizer(), {"eos_token": "<|im_end|>"}, {}))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of packages that count as not installed; empty at first."""
    missing: set[str] = set()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        web_assets.importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    return missing


@pytest.fixture
def http(engine: ScriptedEngine, without: set[str]) -> Iterator[httpx.Client]:
    """A client of a server without the extra."""
    without |= {"plotly", "swagger_ui"}
    app = create_app(engine, ServerSettings(), Metrics("tiny"), dashboard_router(engine), names=["tiny"])
    with TestClient(app) as client:
        yield client


def welcome(engine: ScriptedEngine) -> list[str]:
    with server.listen("127.0.0.1", 0) as listener:
        return list(server._welcome(engine.info, ServerSettings(), "tiny", listener))


def test_the_api_answers_without_the_extra(http: httpx.Client) -> None:
    assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert "/v1/chat/completions" in http.get("/schema/openapi.json").json()["paths"]
    assert INSTALL in http.get("/dashboard").text


@pytest.mark.parametrize("path", ["/docs", "/dashboard/plotly.js"])
def test_a_page_that_needs_the_extra_names_it(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert answer.status_code == 404
    assert INSTALL in answer.json()["error"]["message"]


def test_the_welcome_names_what_is_missing(engine: ScriptedEngine, without: set[str]) -> None:
    cases: list[tuple[set[str], Any]] = [
        (set(), []),
        ({"plotly"}, [f"  {INSTALL} adds the dashboard's charts"]),
        ({"swagger_ui"}, [f"  {INSTALL} adds /docs"]),
        ({"plotly", "swagger_ui"}, [f"  {INSTALL} adds the dashboard's charts and /docs"]),
    ]
    for missing, lines in cases:
        without.clear()
        without |= missing
        assert [line for line in welcome(engine) if INSTALL in line] == lines
