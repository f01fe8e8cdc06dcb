"""Directories for sockets are removed, by their owner or by the next one when it was killed."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dispec.serving.client.engine_process import SocketDirectory
from tests.checkpoints import save_tiny
from tests.commands import ROOT
from tests.servers import server

_OWNER = """
import sys, tempfile
from pathlib import Path
from dispec.serving.client.engine_process import SocketDirectory
tempfile.tempdir = sys.argv[1]
directory = SocketDirectory()
Path(directory.path, "to-engine").touch()
print(directory.path, flush=True)
sys.stdin.read()
"""


@contextmanager
def owner(parent: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process with a directory there, which is killed at the end."""
    command = [sys.executable, "-c", _OWNER, str(parent)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory for temporary files, with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


def test_what_a_killed_owner_left_is_removed_and_nothing_else(parent: Path) -> None:
    elsewhere = parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (parent / "dispec-sockets-link").symlink_to(elsewhere)
    (parent / "dispec-sockets-fresh").mkdir()  # made by a process that will lock it next
    (parent / "dispec-sockets-stale").mkdir()  # by one that was killed before it made sockets
    os.utime(parent / "dispec-sockets-stale", (0, 0))
    (parent / "dispec-sockets-file").touch()
    with owner(parent) as (_, alive):
        with owner(parent) as (_, abandoned):
            assert abandoned.is_dir()
        assert (abandoned / "to-engine").exists()
        directory = SocketDirectory()
        assert not abandoned.exists()
        assert (alive / "to-engine").exists()
        assert (elsewhere / "file").exists()
        assert (parent / "dispec-sockets-fresh").exists()
        assert not (parent / "dispec-sockets-stale").exists()
        directory.remove()
        directory.remove()
        assert not os.path.exists(directory.path)
        assert (alive / "to-engine").exists()


def test_paths_of_sockets_stay_short(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = parent / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    directory = SocketDirectory()
    assert Path(directory.path).parent == Path("/tmp")
    assert len(f"{directory.path}/to-engine") <= 100
    directory.remove()


def test_a_server_that_was_killed_with_its_engine_leaves_nothing_to_the_next(tmp_path: Path, monkeypatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as short:  # tmp_path may be too long for sockets
        monkeypatch.setenv("TMPDIR", short)
        save_tiny(tmp_path / "model", "qwen3")
        found: list[Path] = []
        for _ in range(2):
            with server(tmp_path, tmp_path / "model") as running_server:
                engine = running_server.engine_process()
                found.append(Path(engine.cmdline()[-1]))
                engine.suspend()  # or it would tidy up itself, as it does where only the server is killed
                running_server.process.kill()
                engine.kill()
            assert found[-1].is_dir()
        assert found[0].parent == Path(short)
        assert not found[0].exists()
