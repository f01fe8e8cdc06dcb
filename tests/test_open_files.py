"""More connections than file descriptors: each gets an answer, and the log says why."""

import asyncio
import contextlib
import errno
import json
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dispec.serving import server as serving_server
from dispec.serving.http import acceptor
from dispec.serving.http.acceptor import Acceptor, num_reserved, raise_file_limit
from tests.checkpoints import save_tiny
from tests.commands import dispec, one_sentence
from tests.servers import PATIENCE, server, wait_for

NUM_STREAMS = 120


@contextlib.contextmanager
def streams(url: str, count: int) -> Iterator[list[socket.socket]]:
    """So many connections at once, each with a request for a stream that outlasts the test."""
    address = urlsplit(url)
    body = json.dumps({"prompt": "hello", "max_tokens": 4000, "ignore_eos": True, "stream": True}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            connection = socket.create_connection((address.hostname, address.port), timeout=PATIENCE)
            found.append(stack.enter_context(connection))
        for connection in found:
            connection.sendall(request)
        yield found


def answer(connection: socket.socket) -> tuple[int, dict]:
    """Status, and of an error the body: to the end of the connection."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(connection.makefile("rb"))
        status = int(file.readline().split()[1])
        if status == 200:
            return status, {}
        stack.callback(connection.close)
        head, _, body = file.read().partition(b"\r\n\r\n")
        assert b"retry-after: 1" in head
        assert b"connection: close" in head
        return status, json.loads(body)["error"]


def test_connections_beyond_the_limit_are_answered_with_503(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny", "qwen3", max_position_embeddings=4096)
    with server(tmp_path, tmp_path / "tiny", open_files=64) as running_server:
        with streams(running_server.url, NUM_STREAMS) as connections:
            answers = [answer(connection) for connection in connections]
        served = [status for status, _ in answers if status == 200]
        refused = [error for status, error in answers if status == 503]
        assert len(served) + len(refused) == NUM_STREAMS
        assert len(served) >= 5
        assert len(refused) >= NUM_STREAMS - 64
        assert {error["code"] for error in refused} == {"overloaded"}
        assert all("file descriptor" in error["message"] for error in refused)
        told = [line["message"] for line in running_server.log_lines() if line["level"] == "warning"]
        assert any("may open 64 files" in line for line in told)
        assert 1 <= sum("connections refused with 503" in line for line in told) < 10
        # What is left behind by the storm: nothing.
        wait_for(lambda: running_server.get("/health").status_code == 200)
        wait_for(running_server.is_idle)
        assert running_server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200
        # There is room for another engine even while the connections hold all they may have.
        with streams(running_server.url, NUM_STREAMS) as connections:
            answer(connections[-1])
            running_server.engine_process().kill()
            wait_for(lambda: "restarted and serves" in running_server.log.read_text())


def test_the_soft_limit_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [256, 4096]

    def set_limit(kind: int, wanted: tuple[int, int]) -> None:
        if not 0 <= wanted[0] <= most:
            raise ValueError("not allowed to raise maximum limit")
        limits[0] = wanted[0]

    monkeypatch.setattr(acceptor.resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(acceptor.resource, "setrlimit", set_limit)
    most = 4096
    assert raise_file_limit() == limits[0] == 4096
    limits, most = [256, resource.RLIM_INFINITY], 2**16  # a system that has a limit of its own
    assert raise_file_limit() == limits[0] == 2**16
    limits, most = [2**17, resource.RLIM_INFINITY], 2**16
    assert raise_file_limit() == limits[0] == 2**17  # never lowered
    limits = [resource.RLIM_INFINITY, resource.RLIM_INFINITY]
    assert raise_file_limit() > 2**20


@pytest.mark.parametrize(
    ("limit", "args", "fewest"),
    [
        (63, [], 64),
        (95, ["--disaggregate"], 96),
        (223, ["--disaggregate", "--num-prefill-workers", "2", "--num-decode-workers", "4"], 224),
        (287, ["--disaggregate", "--autoscale", "1:4"], 288),
    ],
)
def test_too_few_files_for_any_connection_are_refused_at_start(monkeypatch, limit, args, fewest) -> None:
    monkeypatch.setattr(serving_server, "raise_file_limit", lambda: limit)
    result = dispec("serve", "--port", "0", *args)
    assert result.code == 2
    assert f"may open {limit} files, must be at least {fewest}: raise `ulimit -n`" in one_sentence(result)


class Full:
    """A listener that has no descriptor for the next connections."""

    def __init__(self, listener: socket.socket, count: int) -> None:
        self._listener, self._count = listener, count

    def accept(self):
        if self._count:
            self._count -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self._listener.accept()

    def __getattr__(self, name: str):
        return getattr(self._listener, name)


class Greeting(asyncio.Protocol):
    def connection_made(self, transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"hello")
        self._transport.close()


async def _told(address: tuple[str, int]) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        return await reader.read()
    finally:
        writer.close()


def test_a_process_without_descriptors_accepts_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "_PAUSE_SECONDS", 0)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            accepting = Acceptor(Full(listener, 3), Greeting, 2**20)  # type: ignore[arg-type]
            assert await _told(listener.getsockname()) == b"hello"
            accepting.close()
            accepting.close()

    asyncio.run(main())


def test_refusals_are_few_at_a_time_and_a_silent_client_does_not_block_the_others(monkeypatch) -> None:
    monkeypatch.setattr(acceptor, "_REQUEST_SECONDS", 0.01)
    assert num_reserved(64) == 16

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            accepting = Acceptor(listener, Greeting, 0)  # no descriptor is below the reserve
            address = listener.getsockname()
            silent = [await asyncio.open_connection(*address) for _ in range(20)]
            found = await asyncio.gather(*(_told(address) for _ in range(20)))
            assert all(text.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") for text in found)
            for reader, writer in silent:
                assert (await reader.read()).startswith(b"HTTP/1.1 503")
                writer.close()
            accepting.close()

    asyncio.run(main())
