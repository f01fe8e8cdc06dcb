"""`dispec serve` in a process of its own, on a free port, for tests."""

import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI

from tests.commands import running
from tests.small_engine import OPTIONS

PATIENCE = 60  # seconds after which a condition counts as never coming
KEY = "key-of-the-tests"
DEFAULT_MODEL = "smollm2"


@dataclass
class Server:
    """A server that is ready. `log` is the file that its standard error goes to."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    http: httpx.Client

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        return self.http.request(method, path, **more)

    def stream(self, path: str, body: dict[str, Any]) -> AbstractContextManager[httpx.Response]:
        return self.http.stream("POST", path, json=body | {"stream": True})

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.request("GET", path, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.request("POST", path, **({"json": body} if body is not None else {}), **more)

    def stats(self) -> dict[str, Any]:
        return self.get("/stats").json()

    def log_lines(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def engine_processes(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "dispec.engine.process.engine_loop" in child.cmdline()]

    def engine_process(self) -> psutil.Process:
        return self.engine_processes()[0]

    def is_idle(self) -> bool:
        """Whether front and engine have nothing under way, and the engine's books are in order."""
        stats = self.stats()
        books = stats["engine"]
        if books is None or stats["requests"] or books["running"] or books["waiting"]:
            return False
        assert books["problem"] is None
        return books["used_blocks"] == 0


def wait_for(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Its first true value."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} never came")


def options(model: Path | str, **others: Any) -> list[str]:
    """The options of the tests' small engines as flags."""
    given = OPTIONS | {"model": str(model), "port": 0} | others
    flags: list[str] = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    return flags


@contextmanager
def server(
    directory: Path, model: Path | str, *, args: list[str] | None = None, open_files: int | None = None, **others: Any
) -> Iterator[Server]:
    """Start one and wait until it is ready; `directory` is for its log. open_files: that each process may have."""
    log = directory / "server.log"
    flags = options(model, **others) if args is None else args
    more: dict[str, Any] = {}
    if open_files is not None:
        more["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    with log.open("wb") as errors, running(["serve", *flags], stdout=subprocess.PIPE, stderr=errors, **more) as process:
        url = _url_of(process, log)
        headers = {"Authorization": f"Bearer {others['api_key']}"} if "api_key" in others else {}
        family = psutil.Process(process.pid).children(recursive=True)
        http = httpx.Client(base_url=url, headers=headers, timeout=PATIENCE)
        try:
            yield Server(process, url, log, http)
        finally:
            http.close()
            process.kill()
            _, left = psutil.wait_procs(family, timeout=PATIENCE)
            assert not left, "an engine process outlived its front"


@contextmanager
def default_model_server(directory: Path) -> Iterator[Server]:
    """Start a server of the default model, `DEFAULT_MODEL`."""
    args = ["--port", "0", "--enforce-eager", "--kv-cache-memory", "128MiB"]
    with server(directory, DEFAULT_MODEL, args=args) as running_server:
        yield running_server


def openai_client(served: Server) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def _url_of(process: subprocess.Popen[bytes], log: Path) -> str:
    assert process.stdout is not None
    seen = b""
    while b"\n  try " not in seen:
        data = os.read(process.stdout.fileno(), 4096)
        assert data, f"the server did not start: {seen.decode()} {log.read_text()}"
        seen += data
    line = next(line for line in seen.decode().splitlines() if line.startswith("  API "))
    return line.split()[1].removesuffix("/v1")
