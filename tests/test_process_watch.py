"""The end of a watched process is noticed at once, and not after the watch was closed."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from dispec.engine.distributed.process_watch import ProcessWatch

PATIENCE = 60


@pytest.fixture
def processes() -> Iterator[list["subprocess.Popen[bytes]"]]:
    found = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    yield found
    for one in found:
        one.kill()
        one.communicate()


def watch_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "process watch"]


def test_the_first_process_that_ends_calls_the_function(processes: list["subprocess.Popen[bytes]"]) -> None:
    called = threading.Event()
    watch = ProcessWatch([one.pid for one in processes], called.set)
    processes[1].kill()
    assert called.wait(PATIENCE)
    assert processes[0].poll() is None
    watch.close()


def test_a_closed_watch_calls_nothing(processes: list["subprocess.Popen[bytes]"]) -> None:
    called = threading.Event()
    watch = ProcessWatch([one.pid for one in processes], called.set)
    threads = watch_threads()
    watch.close()
    processes[0].kill()
    for thread in threads:
        thread.join(PATIENCE)
    assert not watch_threads()
    assert not called.is_set()
