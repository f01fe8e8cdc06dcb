"""Web pages of other origins: what a browser asks before it sends their requests, and what it needs to see in answers.

`Browser` applies the rules of the Fetch standard to what the server answers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar.testing import TestClient

from dispec.serving.api.app import create_app
from dispec.serving.cli.option_groups import SERVER, parsed
from dispec.serving.client.process_client import ProcessClient
from dispec.serving.http.cors import Cors, origin_as_sent
from dispec.serving.observability.metrics import Metrics
from dispec.serving.settings import ServerSettings
from tests.checkpoints import save_tiny
from tests.servers import KEY, Server, server

APP = "https://app.example.com"
OTHER = "https://other.example.com"
BODY_LIMIT = 10_000


class Blocked(Exception):
    """The browser keeps the answer from the page, or does not send the request at all."""


class Browser:
    """A browser with a page of `origin` that uses the server."""

    def __init__(self, http: httpx.Client, origin: str, credentials: bool = False) -> None:
        self._http = http
        self._origin = origin
        self._credentials = credentials

    def fetch(self, method: str, path: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        headers = headers or {}
        content = self._http.build_request(method, path, headers=headers, **body).headers.get("content-type", "")
        is_simple = content.partition(";")[0] in ("", "text/plain", "application/x-www-form-urlencoded")
        special = sorted(name.lower() for name in headers if name.lower() not in ("accept", "content-type"))
        if not is_simple:
            special.append("content-type")
        if method not in ("GET", "HEAD", "POST") or special:
            self._preflight(method, path, special)
        sent = headers | {"Origin": self._origin, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
        answer = self._http.request(method, path, headers=sent, **body)
        self._check(answer)
        return answer

    def _preflight(self, method: str, path: str, headers: list[str]) -> None:
        asked = {"Origin": self._origin, "Access-Control-Request-Method": method, "Sec-Fetch-Site": "cross-site"}
        if headers:
            asked["Access-Control-Request-Headers"] = ",".join(headers)
        answer = self._http.request("OPTIONS", path, headers=asked)
        self._check(answer)
        if not answer.is_success:
            raise Blocked(f"the preflight has status {answer.status_code}")
        allowed = _listed(answer, "access-control-allow-methods")
        if method not in allowed and method not in ("GET", "HEAD", "POST"):
            raise Blocked(f"method {method} is not allowed")
        known = {name.lower() for name in _listed(answer, "access-control-allow-headers")}
        if missing := set(headers) - known:
            raise Blocked(f"headers {missing} are not allowed")

    def _check(self, answer: httpx.Response) -> None:
        given = answer.headers.get_list("access-control-allow-origin")
        if given not in ([self._origin], *([] if self._credentials else [["*"]])):
            raise Blocked(f"the answer allows {given}")
        if self._credentials and answer.headers.get("access-control-allow-credentials") != "true":
            raise Blocked("credentials are not allowed")


def _listed(answer: httpx.Response, name: str) -> set[str]:
    return {item.strip() for item in answer.headers.get(name, "").split(",") if item.strip()}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a key, open to the pages of one origin."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(directory, "llama")
    with server(
        tmp_path_factory.mktemp("server"), directory, api_key=KEY, allowed_origins=APP, max_body_bytes=BODY_LIMIT
    ) as running:
        yield running


@pytest.fixture
def http(guarded: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=60) as http:
        yield http


AUTHORIZED = {"Authorization": f"Bearer {KEY}", "X-Stainless-Lang": "js"}


def test_a_page_of_an_allowed_origin_sees_answers_and_errors(http: httpx.Client) -> None:
    page = Browser(http, APP)
    body = {"prompt": "hello", "max_tokens": 2}
    answer = page.fetch("POST", "/v1/completions", AUTHORIZED, json=body)
    assert answer.status_code == 200
    assert {"x-request-id", "retry-after"} <= {
        name.lower() for name in _listed(answer, "access-control-expose-headers")
    }
    assert page.fetch("GET", "/v1/models", AUTHORIZED).json()["data"][0]["id"] == "tiny"
    for status, method, path, headers, more in (
        (401, "GET", "/v1/models", {}, {}),
        (401, "POST", "/v1/completions", {"Authorization": "Bearer wrong"}, {"json": body}),
        (404, "GET", "/no/such/route", AUTHORIZED, {}),
        (404, "POST", "/v1/completions", AUTHORIZED, {"json": body | {"model": "gpt-9"}}),
        (405, "DELETE", "/v1/models", AUTHORIZED, {}),
        (400, "POST", "/v1/completions", AUTHORIZED, {"json": {}}),
        (413, "POST", "/v1/completions", AUTHORIZED, {"json": {"prompt": "x" * BODY_LIMIT}}),
        (415, "POST", "/v1/completions", AUTHORIZED, {"content": "x", "headers": {"Content-Type": "text/plain"}}),
        (431, "GET", "/version", AUTHORIZED | {f"X-{index}": "x" * 8000 for index in range(9)}, {}),
    ):
        answer = page.fetch(method, path, headers | more.pop("headers", {}), **more)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]


def test_a_page_of_an_allowed_origin_reads_a_stream(http: httpx.Client) -> None:
    body = {"prompt": "hello", "max_tokens": 3, "stream": True, "ignore_eos": True}
    headers = AUTHORIZED | {"Origin": APP, "Sec-Fetch-Site": "cross-site"}
    with http.stream("POST", "/v1/completions", json=body, headers=headers) as stream:
        assert stream.headers["access-control-allow-origin"] == APP
        assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"


def test_a_preflight_needs_no_key_and_opens_nothing(http: httpx.Client) -> None:
    asked = {"Origin": APP, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for path in ("/v1/chat/completions", "/no/such/route", "/dashboard"):
        answer = http.options(path, headers=asked)
        assert (answer.status_code, answer.content) == (204, b"")
        assert answer.headers["access-control-allow-headers"] == "authorization"
        assert answer.headers["x-request-id"]
        assert "www-authenticate" not in answer.headers
    # What is no preflight of an allowed origin is closed, as ever.
    for headers in ({}, {"Origin": APP}, asked | {"Origin": OTHER}, asked | {"Origin": f"{APP}.evil.com"}):
        assert http.options("/v1/chat/completions", headers=headers).status_code == 401
    assert http.get("/v1/models", headers=asked).status_code == 401


def test_pages_of_other_origins_are_kept_out(http: httpx.Client) -> None:
    page = Browser(http, OTHER)
    with pytest.raises(Blocked, match="the answer allows"):
        page.fetch("POST", "/v1/completions", AUTHORIZED, json={"prompt": "hello", "max_tokens": 1})
    # Nor is a request answered that a browser sends without asking first.
    sent = AUTHORIZED | {"Origin": OTHER, "Sec-Fetch-Site": "cross-site"}
    answer = http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 1}, headers=sent)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["vary"] == "Origin"  # or a cache would give this answer to the pages that are allowed


def test_a_cached_script_varies_by_more_than_its_origin(http: httpx.Client) -> None:
    varies = http.get("/dashboard/plotly.js", headers=AUTHORIZED | {"Origin": APP}).headers.get_list("vary")
    assert {"Accept-Encoding", "Origin"} <= set(varies)


# Other policies, without an engine


class _Broken:
    def render(self) -> bytes:
        raise RuntimeError("broken")


def _app(metrics: Any = None, **settings: Any) -> TestClient:
    client = ProcessClient({}, max_queued_requests=1, max_queued_tokens=1, stall_seconds=1)  # never started
    return TestClient(create_app(client, ServerSettings(**settings), metrics or Metrics("tiny")))


def test_no_cors_headers_without_allowed_origins() -> None:
    with _app() as http:
        for method, path in (("GET", "/version"), ("OPTIONS", "/v1/models"), ("GET", "/none")):
            answer = http.request(method, path, headers={"Origin": APP, "Access-Control-Request-Method": "GET"})
            assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]


def test_every_origin() -> None:
    with _app(allowed_origins=("*",)) as http:
        for origin in (APP, OTHER, "null"):
            assert Browser(http, origin).fetch("GET", "/version", {"Authorization": "x"}).status_code == 200
            with pytest.raises(Blocked):
                Browser(http, origin, credentials=True).fetch("GET", "/version")


def test_credentials_methods_and_headers() -> None:
    settings = {"allowed_origins": (APP, "http://localhost:3000"), "allow_credentials": True}
    with _app(**settings, allowed_methods=("get", "POST"), allowed_headers=("Authorization",)) as http:
        for origin in settings["allowed_origins"]:
            page = Browser(http, origin, credentials=True)
            assert page.fetch("GET", "/version", {"Authorization": "x"}).status_code == 200
            with pytest.raises(Blocked, match="method DELETE"):
                page.fetch("DELETE", "/version")
            with pytest.raises(Blocked, match="x-other"):
                page.fetch("GET", "/version", {"X-Other": "x"})
            # The type of a body need not be allowed by name.
            assert page.fetch("POST", "/v1/completions", json={"prompt": "x"}).status_code == 503
        with pytest.raises(Blocked):
            Browser(http, OTHER).fetch("GET", "/version")


def test_cors_headers_of_internal_errors() -> None:
    with _app(_Broken(), allowed_origins=(APP,)) as http:
        answer = Browser(http, APP).fetch("GET", "/metrics")
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"


# Options


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"allowed_origins": ["app.example.com"]}, "allowed_origins holds 'app.example.com', must be"),
        ({"allowed_origins": [f"{APP}/"]}, "allowed_origins holds"),
        ({"allowed_origins": ["https://*.example.com"]}, "allowed_origins holds"),
        ({"allowed_origins": ["https://a:b@c.com"]}, "allowed_origins holds"),
        ({"allowed_origins": ["https://a.com:99999"]}, "allowed_origins holds"),
        ({"allowed_origins": [""]}, "allowed_origins holds ''"),
        ({"allowed_origins": ['["https://a.com", 5]']}, "allowed_origins is '[\"https://a.com\", 5]', must be a JSON"),
        ({"allowed_methods": ["GET"]}, "allowed_methods is for the pages of allowed_origins"),
        ({"allowed_headers": ["X-A"]}, "allowed_headers is for the pages of allowed_origins"),
        ({"allowed_origins": [APP], "allowed_headers": ["a b"]}, "allowed_headers holds 'a b'"),
        ({"allow_credentials": True}, "allow_credentials is for pages that allowed_origins names"),
        ({"allowed_origins": ["*"], "allow_credentials": True}, "allow_credentials is for pages that"),
    ],
)
def test_options_with_mistakes(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="^" + said.replace("[", r"\[")):
        ServerSettings(**parsed(SERVER, settings))


def test_origins_are_given_one_by_one_or_as_a_list(tmp_path: Path) -> None:
    expected = ("https://a.com", "http://localhost:3000")
    for given in (
        list(expected),
        ['["https://A.com:443", "http://localhost:3000"]'],
        ['["https://a.com",', f'"{expected[1]}"]'],
    ):
        assert ServerSettings(**parsed(SERVER, {"allowed_origins": given})).cors == Cors(origins=expected)
    for origin in ("vscode-webview://abc", "http://[::1]:80", "chrome-extension://abcdef", "null"):
        assert origin_as_sent(origin) == origin.removesuffix(":80")
