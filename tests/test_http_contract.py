"""What HTTP itself asks of a server: HEAD, types and encodings of bodies, methods, names in paths."""

import gzip
import json
import socket
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest

from tests.servers import Server, wait_for

pytest_plugins = ["tests.api_server"]

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "hello", "max_tokens": 1},
    "/v1/responses": {"input": "hello", "max_output_tokens": 1, "store": False},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hello"}]},
    "/generate": {"prompt": "hello", "max_new_tokens": 1},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [40]},
}
PAGES = ("/", "/docs", "/openapi.json", "/schema", "/schema/openapi.json", "/schema/assets/swagger-ui.css")
DASHBOARD = ("/dashboard", "/dashboard/dashboard.js", "/dashboard/plotly.js")
WITHOUT_BODY = {"/v1/responses/{response_id}/cancel"}
CHANGING = ("date", "x-request-id", "request-id", "content-length")  # from one answer to the next


def operations(served: Server, method: str) -> list[str]:
    paths = served.get("/schema/openapi.json").json()["paths"]
    return [path.replace("{model_id}", "tiny") for path, known in paths.items() if method in known]


def test_every_post_route_is_tested(served: Server) -> None:
    assert set(operations(served, "post")) == BODIES.keys() | WITHOUT_BODY


# HEAD


def test_head_equals_get_without_a_body(served: Server) -> None:
    paths = [*operations(served, "get"), *PAGES, *DASHBOARD, "/v1/models/none", "/no/such/route", "/v1/completions"]
    assert len(paths) > 20
    statuses = set()
    for path in paths:
        got, head = served.get(path), served.request("HEAD", path)
        assert head.status_code == got.status_code, path
        assert head.content == b""
        same = [{k: v for k, v in answer.headers.items() if k not in CHANGING} for answer in (got, head)]
        assert same[0] == same[1], path
        if path not in ("/metrics", "/stats"):
            assert head.headers["content-length"] == got.headers["content-length"], path
        statuses.add(head.status_code)
    assert {200, 404, 405} < statuses


def test_head_response_has_no_body_bytes(served: Server) -> None:
    """httpx would not show them: it knows that there are none."""
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(
            b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\nHEAD /none HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        received = b""
        while data := connection.recv(65536):
            received += data
    first, second, rest = received.split(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert second.startswith(b"HTTP/1.1 404 ")
    assert rest == b""


def test_head_of_a_stream_without_end_ends(served: Server) -> None:
    with served.http.stream("GET", "/dashboard/events") as stream:
        expected = stream.headers["content-type"]
    head = served.request("HEAD", "/dashboard/events")
    assert head.status_code == 200
    assert head.headers["content-type"] == expected
    line = wait_for(
        lambda: next((x for x in served.log_lines() if x.get("method") == "HEAD" and "events" in x["path"]), None)
    )
    assert line["status"] == 200


def test_allow_header(served: Server) -> None:
    for path, allowed in (("/v1/models", {"GET", "HEAD", "OPTIONS"}), ("/v1/completions", {"POST", "OPTIONS"})):
        for method, status in (("OPTIONS", 204), ("DELETE", 405)):
            answer = served.request(method, path)
            assert answer.status_code == status
            assert set(answer.headers["allow"].split(", ")) == allowed


# Types and encodings of bodies


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/msgpack",
        "application/jsonlines",
        "application/json; charset=utf-16",
        "application/json; charset=latin-1",
        "x",
    ],
)
def test_unsupported_content_types(served: Server, path: str, kind: str) -> None:
    answer = served.post(path, content=json.dumps(BODIES[path]), headers={"Content-Type": kind})
    assert answer.status_code == 415
    error = answer.json()["error"]
    assert error["message"] == f"the body's content type is {kind}, must be application/json in UTF-8"
    if path.startswith("/v1/messages"):  # Anthropic's form
        assert error["type"] == "invalid_request_error"
    else:
        assert (error["param"], error["code"]) == (None, "unsupported_media_type")
    assert answer.headers["accept"] == "application/json"


@pytest.mark.parametrize("path", BODIES)
def test_unsupported_content_encodings(served: Server, path: str) -> None:
    body = json.dumps(BODIES[path]).encode()
    for coding, content in (("gzip", gzip.compress(body)), ("br", body), ("identity, gzip", body), ("zstd", body)):
        headers = {"Content-Type": "application/json", "Content-Encoding": coding}
        answer = served.post(path, content=content, headers=headers)
        assert answer.status_code == 415
        assert f"content encoding is '{coding}'" in answer.json()["error"]["message"]
        assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("path", BODIES)
def test_supported_content_types(served: Server, path: str) -> None:
    body = json.dumps(BODIES[path])
    for kind in ("application/json", 'Application/JSON; Charset="UTF-8"', "application/vnd.api+json", None):
        headers = {} if kind is None else {"Content-Type": kind}
        assert served.post(path, content=body, headers=headers).status_code == 200
    assert served.post(path, content=body, headers={"Content-Encoding": "identity"}).status_code == 200
    # A page of another origin that names no type would spare itself the preflight, and with it the permission.
    answer = served.post(path, content=body, headers={"Origin": "https://other.example.com"})
    assert answer.status_code == 415


def test_a_connection_outlives_a_body_that_was_not_read(served: Server) -> None:
    with httpx.Client(base_url=served.url, timeout=60, limits=httpx.Limits(max_connections=1)) as http:
        answer = http.post("/v1/completions", content=b"x" * 2**22, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 415
        assert http.get("/version").status_code == 200


# Names


def test_a_model_is_found_by_every_name_that_requests_may_use(served: Server) -> None:
    root = served.get("/v1/models/tiny").json()["root"]
    assert root.startswith("/")
    for name in ("tiny", root):
        found = served.get(f"/v1/models/{quote(name, safe='')}")
        assert found.status_code == 200
        assert (found.json()["id"], found.json()["root"]) == (name, root)
        assert served.post("/v1/completions", BODIES["/v1/completions"] | {"model": name}).status_code == 200
    for name in ("none", "tiny/x", root + "x"):
        answer = served.get(f"/v1/models/{quote(name, safe='')}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
