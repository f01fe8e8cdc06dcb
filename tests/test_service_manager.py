"""What a server tells systemd, read from a socket that a test binds in its place."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dispec.serving.service_manager import feed_watchdog, notify
from tests.checkpoints import save_tiny
from tests.running_server import PATIENCE
from tests.servers import server


class Manager:
    """Receives the notifications that go to NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(PATIENCE)
        self.socket.bind(address)

    def next(self) -> list[str]:
        return self.socket.recv(4096).decode().split("\n")

    def is_quiet(self) -> bool:
        self.socket.setblocking(False)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(PATIENCE)
        return False


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    manager = Manager(address)
    yield manager
    manager.socket.close()


def test_abstract_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"dispec-test-{os.getpid()}"
    manager = Manager(f"\0{name}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    notify("READY=1", "STATUS=serving")
    assert manager.next() == ["READY=1", "STATUS=serving"]
    manager.socket.close()
    notify("READY=1")  # a manager that has gone is no error


@pytest.mark.parametrize("address", ["", "vsock:2:1234"])
def test_other_addresses_are_ignored(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


def feed(times: int, manager: Manager) -> list[list[str]]:
    async def run() -> list[list[str]]:
        task = asyncio.create_task(feed_watchdog())
        found = [await asyncio.to_thread(manager.next) for _ in range(times)]
        task.cancel()
        return found

    return asyncio.run(run())


def test_the_watchdog_is_fed(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert feed(3, manager) == [["WATCHDOG=1"]] * 3


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "2000", "WATCHDOG_PID": "1"}])
def test_no_watchdog_of_this_process(
    environment: dict[str, str], manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asyncio.run(asyncio.wait_for(feed_watchdog(), PATIENCE))
    assert manager.is_quiet()


@pytest.mark.slow
def test_a_server_is_ready_and_stops(manager: Manager, tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny", "qwen3")
    with server(tmp_path, tmp_path / "tiny") as running:
        assert manager.next() == ["READY=1", "STATUS=serving tiny"]
        assert manager.is_quiet()
        body = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True}
        with running.stream("/v1/completions", body) as stream:
            lines = stream.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            assert manager.next() == ["STOPPING=1", "STATUS=finishing 1 requests"]
            assert "data: [DONE]" in lines
        assert running.process.wait(PATIENCE) == 0
    assert manager.is_quiet()
