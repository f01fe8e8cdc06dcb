"""The server as a process: its options, its address, its keys, its limits, and how it ends."""

import base64
import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest
from litestar.testing import TestClient
from openai import OpenAI

from dispec.serving import server as serving_server
from dispec.serving.api.app import create_app
from dispec.serving.client.process_client import ProcessClient
from dispec.serving.observability.metrics import Metrics
from dispec.serving.settings import ServerSettings
from tests.checkpoints import save_tiny
from tests.commands import dispec, one_sentence, running
from tests.servers import KEY, PATIENCE, Server, options, server, wait_for

CONTEXT = 4096
LONG = {"prompt": "hello", "max_tokens": CONTEXT, "ignore_eos": True, "temperature": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(directory, "qwen3", max_position_embeddings=CONTEXT)
    stated = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(stated | {"temperature": 0.0, "top_k": 3}))
    return directory


@pytest.fixture(scope="module")
def guarded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a key, a second name, and room for one sequence and one that waits."""
    directory = tmp_path_factory.mktemp("server")
    limits = {"keep_alive_seconds": 0.1, "max_num_seqs": 1, "max_queued_requests": 1, "max_body_bytes": 100_000}
    with server(directory, model, api_key=KEY, served_model_name="nick", **limits) as running_server:
        yield running_server


# Options


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServerSettings, dict[str, Any]]]:
    """What `dispec serve` would have started."""
    calls: list[tuple[ServerSettings, dict[str, Any]]] = []

    def run(settings: ServerSettings, engine: dict[str, Any], **_: Any) -> int:
        calls.append((settings, engine))
        return 0

    monkeypatch.setattr(serving_server, "run", run)
    return calls


def test_flag_before_environment_before_file_before_default(
    started: list[tuple[ServerSettings, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "dispec.toml"
    config.write_text(
        'port = 1\nmax_queued_requests = 1\nmax-model-len = 100\napi_key = ["a", "b"]\nenforce_eager = true\n'
        'model = "from the file"\ndrain_timeout = 3\n'
    )
    monkeypatch.setenv("DISPEC_PORT", "2")
    monkeypatch.setenv("DISPEC_MAX_QUEUED_REQUESTS", "2")
    result = dispec("serve", "--config", str(config), "--port", "3")
    assert result.code == 0, result.err
    settings, engine = started[0]
    assert settings.port == 3
    assert settings.max_queued_requests == 2
    assert settings.api_key == ("a", "b")
    assert settings.drain_timeout == 3
    assert settings.host == "127.0.0.1"
    assert engine == {"model": "from the file", "max_model_len": 100, "enforce_eager": True}
    monkeypatch.setenv("DISPEC_CONFIG", str(config))
    monkeypatch.setenv("DISPEC_API_KEY", "c d")
    assert dispec("serve", "from the command line").code == 0
    assert started[1][0].api_key == ("c", "d")
    assert started[1][1]["model"] == "from the command line"


def test_origins_by_file_variable_and_flag(
    started: list[tuple[ServerSettings, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "dispec.toml"
    config.write_text('allowed_origins = ["https://a.com", "https://b.com"]\nallow_credentials = true\n')
    assert dispec("serve", "--config", str(config)).code == 0
    monkeypatch.setenv("DISPEC_ALLOWED_ORIGINS", '["https://c.com", "https://d.com"]')
    assert dispec("serve").code == 0
    assert dispec("serve", "--allowed-origins", '["*"]', "--allowed-methods", "GET").code == 0
    both = [(settings.allowed_origins, settings.allow_credentials) for settings, _ in started]
    assert both[:2] == [(("https://a.com", "https://b.com"), True), (("https://c.com", "https://d.com"), False)]
    assert started[2][0].cors.allows(b"https://e.com")
    assert started[2][0].allowed_methods == ("GET",)
    result = dispec("serve", "--allowed-origins", "a.com")
    assert "allowed_origins holds 'a.com', must be SCHEME://HOST" in one_sentence(result)


@pytest.mark.parametrize("prefix", ["num_{}_workers", "{}"])  # the names of today and of the release before
@pytest.mark.parametrize("way", ["flag", "variable", "file"])
def test_numbers_of_workers(
    started: list[tuple[ServerSettings, dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    prefix: str,
) -> None:
    given = {prefix.format("prefill"): 2, prefix.format("decode"): 3}
    arguments = ["serve", "--disaggregate"]
    if way == "variable":
        for name, value in given.items():
            monkeypatch.setenv(f"DISPEC_{name.upper()}", str(value))
    elif way == "file":
        (tmp_path / "dispec.toml").write_text("".join(f"{name} = {value}\n" for name, value in given.items()))
        arguments += ["--config", str(tmp_path / "dispec.toml")]
    else:
        for name, value in given.items():
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    result = dispec(*arguments)
    assert result.code == 0, result.err
    settings = started[0][0]
    assert (settings.num_prefill_workers, settings.num_decode_workers) == (2, 3)


def test_keys_from_a_file(started: list[tuple[ServerSettings, dict[str, Any]]], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the team\nfirst\n\n second \n")
    assert dispec("serve", "--api-key-file", str(keys), "--api-key", "third").code == 0
    assert started[0][0].api_key == ("third", "first", "second")
    keys.write_text("\n")
    assert "holds no key" in one_sentence(dispec("serve", "--api-key-file", str(keys)))
    missing = dispec("serve", "--api-key-file", str(tmp_path / "none"))
    assert "No such file" in one_sentence(missing)
    assert missing.code == 2


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ("prot = 1", "has 'prot', which is no option"),
        ("port = true", "port is True, must be a text or a number"),
        ("enforce_eager = 1", "enforce_eager is 1, must be true or false"),
        ("host = [1]", "host is [1]"),
        ('port = "many"', "Invalid value for '--port'"),
        ("port = ", "is not TOML"),
        ("help = true", "has 'help'"),
        ('config = "x"', "has 'config'"),
        ("port = 65536", "port is 65536, must be between 0 and 65535"),
        ("request_timeout = 0", "request_timeout is 0"),
        ('log_format = "xml"', "log_format is 'xml', must be one of auto, json, text"),
        ('api_key = "with a space"', "api_key holds a key"),
    ],
)
def test_files_with_mistakes(
    started: list[tuple[ServerSettings, dict[str, Any]]], tmp_path: Path, contents: str, said: str
) -> None:
    config = tmp_path / "dispec.toml"
    config.write_text(contents)
    result = dispec("serve", "--config", str(config))
    assert result.code != 0
    assert said in one_sentence(result)
    assert not started


def test_every_option_is_listed() -> None:
    shown = dispec("serve", "--help").out
    for name in ("--host", "--port", "--api-key", "--config", "--max-num-seqs", "--dtype", "DISPEC_"):
        assert name in shown


def test_start_errors_name_the_cause(model: Path) -> None:
    assert "there is no model at /no/such" in one_sentence(dispec("serve", "/no/such", "--port", "0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = dispec("serve", "--port", str(taken.getsockname()[1]))
    assert "Address already in use" in one_sentence(result)
    assert "host is 'no such host'" in one_sentence(dispec("serve", "--host", "no such host"))


# Address and keys


def test_it_listens_on_loopback_alone(guarded: Server) -> None:
    addresses = [
        connection.laddr
        for process in (psutil.Process(guarded.process.pid), guarded.engine_process())
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert [(address.ip, address.port) for address in addresses] == [("127.0.0.1", httpx.URL(guarded.url).port)]


def test_listening_socket_names_its_protocol() -> None:
    with serving_server.listen("localhost", 0) as listener:  # or asyncio lets each answer wait for 40 ms
        assert listener.proto == socket.IPPROTO_TCP
        assert listener.family == socket.AF_INET


def _routes(guarded: Server) -> list[tuple[str, str]]:
    document = guarded.get("/schema/openapi.json").json()
    found = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    others = ["/", "/metrics", "/docs", "/schema", "/schema/openapi.json", "/openapi.json", "/dashboard"]
    others += ["/dashboard/events", "/dashboard/plotly.js", "/schema/assets/swagger-ui.css", "/no/such/route"]
    found += [("GET", path) for path in others]
    paths = {path: None for _, path in found}
    return found + [(method, path) for path in paths for method in ("HEAD", "OPTIONS", "DELETE", "TRACE")]


def test_no_route_without_the_key(guarded: Server) -> None:
    routes = _routes(guarded)
    assert len(routes) > 125
    http = httpx.Client(base_url=guarded.url)
    wrong = ("Bearer wrong", f"Bearer {KEY}x", KEY, "")
    refused = [{}, *({"Authorization": value} for value in wrong), {"X-Api-Key": "wrong"}, {"X-Api-Key": f"{KEY}x"}]
    for method, path in routes:
        path = path.replace("{model_id}", "tiny")
        for headers in refused:
            answer = http.request(method, path, headers=headers)
            if path in ("/health", "/live", "/ping"):
                assert answer.status_code == {"GET": 200, "HEAD": 200, "OPTIONS": 204}.get(method, 405)
                continue
            assert answer.status_code == 401, path
            assert "www-authenticate" in answer.headers
            if method != "HEAD":
                assert answer.json()["error"]["type"] == "authentication_error"


def test_the_key_opens(guarded: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong").models.list()
    models = OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY).models
    assert [found.id for found in models.list()] == ["nick"]
    root = models.retrieve("nick").root
    assert models.retrieve(root).id == root
    with pytest.raises(openai.NotFoundError):
        models.retrieve("tiny")
    assert httpx.get(f"{guarded.url}/v1/models", headers={"X-Api-Key": KEY}).status_code == 200
    basic = base64.b64encode(f"any:{KEY}".encode()).decode()
    page = httpx.get(f"{guarded.url}/dashboard", headers={"Authorization": f"Basic {basic}"})
    assert page.status_code == 200
    for path in ("/dashboard", "/docs", "/metrics"):  # the dashboard links to the others
        assert httpx.get(f"{guarded.url}{path}").headers["www-authenticate"].startswith("Basic ")


def test_pages_of_other_sites_are_refused(guarded: Server) -> None:
    body = {"prompt": "hello", "max_tokens": 1}
    for site, status in (("cross-site", 403), ("same-origin", 200), ("none", 200)):
        answer = guarded.post("/v1/completions", body, headers={"Sec-Fetch-Site": site})
        assert answer.status_code == status


# Limits


def test_a_body_and_headers_that_are_too_long(guarded: Server) -> None:
    answer = guarded.post("/v1/completions", {"prompt": "x" * 100_000})
    assert answer.status_code == 413
    assert answer.json()["error"]["message"].endswith("must be at most 100000")
    answer = guarded.post("/v1/completions", content=iter([b"x" * 60_000, b"y" * 60_000]))  # without its length
    assert answer.status_code == 413
    with contextlib.suppress(httpx.TransportError):  # it is not read to its end
        assert guarded.get("/version", headers={"X-Long": "x" * 200_000}).status_code in (400, 431)
    assert guarded.get("/version").status_code == 200


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /version HTTP/1.1\r\nX-Long: ",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX-Long: ",
    ],
)
def test_a_header_or_trailer_without_end_is_not_kept(guarded: Server, beginning: bytes) -> None:
    address = urlsplit(guarded.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(beginning)
        with pytest.raises(ConnectionError):
            connection.sendall(b"x" * 2**26)  # more than any buffer between us holds


def test_full_queue_has_retry_after(guarded: Server) -> None:
    with ThreadPoolExecutor(2) as threads, contextlib.ExitStack() as streams:
        running_one = streams.enter_context(guarded.stream("/v1/completions", LONG))
        lines = running_one.iter_lines()
        next(lines)
        waiting = threads.submit(guarded.post, "/v1/completions", {"prompt": "hello", "max_tokens": 2})
        wait_for(lambda: guarded.get("/load").json() == {"server_load": 2, "running": 1, "waiting": 1})
        refused = guarded.post("/v1/completions", {"prompt": "hello", "max_tokens": 2})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        with OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=20) as client:
            patient = threads.submit(client.completions.create, model="nick", prompt="hello", max_tokens=2)
            running_one.close()
            assert waiting.result().status_code == 200
            assert patient.result().choices[0].finish_reason in ("length", "stop")
    wait_for(guarded.is_idle)


def test_disconnect_leaves_the_queue_at_once(guarded: Server) -> None:
    with guarded.stream("/v1/completions", LONG) as running_one:
        lines = running_one.iter_lines()
        next(lines)
        with guarded.stream("/v1/completions", LONG):
            wait_for(lambda: guarded.get("/load").json()["waiting"] == 1)
        wait_for(lambda: guarded.get("/load").json() == {"server_load": 1, "running": 1, "waiting": 0})
    wait_for(guarded.is_idle)


def test_keep_alive_comments(guarded: Server) -> None:
    engine = guarded.engine_process()
    with guarded.stream("/v1/completions", LONG) as stream:
        lines = stream.iter_lines()
        next(lines)
        engine.suspend()
        try:
            assert ": keep-alive" in lines
        finally:
            engine.resume()
        assert any(line.startswith("data: ") for line in lines)
    wait_for(guarded.is_idle)


def test_checkpoint_defaults_apply_to_omitted_fields(guarded: Server) -> None:
    body = {"prompt": "hello", "max_tokens": 12}
    texts = {guarded.post("/v1/completions", body).json()["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1  # its temperature is 0
    assert guarded.get("/model_info").json()["preferred_sampling_params"] == {"temperature": 0.0, "top_k": 3}


def test_while_it_is_loading() -> None:
    client = ProcessClient({}, max_queued_requests=1, max_queued_tokens=1, stall_seconds=1)  # never started
    with TestClient(create_app(client, ServerSettings(), Metrics("tiny"))) as http:
        assert http.get("/live").status_code == 200
        for answer in (http.get("/health"), http.get("/v1/models"), http.post("/v1/completions", json={"prompt": "x"})):
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the model is being loaded"
            assert int(answer.headers["retry-after"]) >= 1
        assert http.get("/stats").json()["state"] == "loading"


def test_requests_that_take_too_long(model: Path, tmp_path: Path) -> None:
    with server(tmp_path, model, request_timeout=0.5) as running_server:
        answer = running_server.post("/v1/completions", LONG)
        assert answer.status_code == 504
        assert answer.json()["error"]["message"] == "the request took longer than 0.5 s"
        with running_server.stream("/v1/completions", LONG) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert "the request took longer" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
        wait_for(running_server.is_idle)


# The end


def test_an_engine_that_is_killed_in_the_middle_of_a_stream(model: Path, tmp_path: Path) -> None:
    with server(tmp_path, model) as running_server, OpenAI(base_url=f"{running_server.url}/v1", api_key="x") as client:
        body = {"model": "tiny", "stream": True, "max_tokens": CONTEXT - 100, "extra_body": {"ignore_eos": True}}
        stream = iter(client.completions.create(prompt="hello", **body))
        next(stream)
        running_server.engine_process().kill()
        with pytest.raises(openai.APIError, match="SIGKILL"):
            list(stream)


def test_sigterm_lets_running_requests_finish(model: Path, tmp_path: Path) -> None:
    with server(tmp_path, model) as running_server:
        process = running_server.process
        engine = running_server.engine_process()
        with running_server.stream("/v1/completions", LONG | {"max_tokens": 600}) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            for member in (engine, process):  # as service managers signal every process of a group
                member.send_signal(signal.SIGTERM)
            wait_for(lambda: running_server.get("/health").status_code == 503)
            refused = running_server.post("/v1/completions", {"prompt": "hello"})
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert running_server.get("/live").status_code == 200
            rest = [line for line in [first, *lines] if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(PATIENCE) == 0
        assert not engine.is_running()


def test_a_second_signal_forces(model: Path, tmp_path: Path) -> None:
    with server(tmp_path, model) as running_server, running_server.stream("/v1/completions", LONG) as stream:
        lines = stream.iter_lines()
        next(lines)
        running_server.process.send_signal(signal.SIGINT)
        wait_for(lambda: running_server.get("/health").status_code == 503)
        running_server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(httpx.RemoteProtocolError):
            assert "[DONE]" not in "".join(lines)
        assert running_server.process.wait(PATIENCE) == 128 + signal.SIGTERM


def test_interrupting_the_start(model: Path, tmp_path: Path) -> None:
    command = ["serve", *options(model)]
    with (
        (tmp_path / "log").open("wb") as log,
        running(command, stdout=subprocess.DEVNULL, stderr=log) as process,
    ):
        wait_for(lambda: psutil.Process(process.pid).children())  # the engine is on its way
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) in (0, 130)
    assert "Traceback" not in (tmp_path / "log").read_text()
