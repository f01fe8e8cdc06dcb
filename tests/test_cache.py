"""A cache directory that cannot be used costs one warning that names it, and no answer."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from dispec.engine.machine import cache_directory as cache
from dispec.ops.cpu import library
from tests.checkpoints import save_tiny_gguf, tiny_model
from tests.servers import server, wait_for

ROOT = Path(__file__).parent.parent

_ANSWER = """
import logging
from dispec import SamplingParams
from tests.test_compile_options import make
import dispec.ops.cpu.library
llm = make("bfloat16")
print(llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].outputs[0].token_ids)
print(dispec.ops.cpu.library.library() is not None)
"""


def answer(**environment: str) -> tuple[list[str], list[str]]:
    """What an engine of its own process prints, and what it warns of."""
    done = subprocess.run(
        [sys.executable, "-c", _ANSWER],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), [line for line in done.stderr.splitlines() if "Warning: " in line]


def test_an_engine_runs_without_its_cache(tmp_path):
    expected, warned = answer()
    assert warned == []
    if expected[1] != "True":
        pytest.skip("the CPU kernels cannot be built here")
    (tmp_path / "file").write_text("")
    found, warned = answer(DISPEC_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert found == expected
    assert len(warned) == 1
    assert f"the cache directory {tmp_path}/file/cache cannot be used (Not a directory)" in warned[0]
    assert "set DISPEC_CACHE_DIR" in warned[0]


def full_disk(_: object) -> SimpleNamespace:
    return SimpleNamespace(free=5 * 2**20)


def test_a_full_disk_is_said_to_be_full_and_does_without(tmp_path, monkeypatch):
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path))
    (tmp_path / "kept").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "disk_usage", full_disk)
        assert cache.cache_path("kept") == tmp_path / "kept"  # what is there can be read
        with pytest.warns(RuntimeWarning, match=rf"{tmp_path} cannot be used \(5 MiB free, 64 needed\)"):
            path = cache.cache_path("new", "thing")
        assert not path.is_relative_to(tmp_path)
        assert cache.cache_path("other").parent == path.parent.parent  # and no second warning
        with pytest.raises(OSError, match="5 MiB free, 16 needed"):
            library.build(tmp_path / "kernels")


def test_a_compiler_that_fails_is_asked_once(tmp_path, monkeypatch):
    """Its reason is the line that says what is wrong; a day later it is tried again."""
    compiler = tmp_path / "g++"
    compiler.write_text(
        f"#!/bin/sh\necho run >> {tmp_path}/runs\n"
        "echo '/tmp/x.s: Assembler messages:' >&2\n"
        'echo "/tmp/x.s: Fatal error: can\'t write 5 bytes to section .text: No space left on device" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DISPEC_CPU_KERNELS", raising=False)
    load = library.library.__wrapped__  # without what this process remembers
    with pytest.warns(RuntimeWarning, match="running slower without them: .*No space left on device"):
        assert load() is None
    runs = (tmp_path / "runs").read_text()
    with pytest.warns(RuntimeWarning, match="No space left on device, found at an earlier start"):
        assert load() is None
    assert (tmp_path / "runs").read_text() == runs
    (failure,) = (tmp_path / "cache" / "cpu-kernels").glob("*.failed")
    yesterday = failure.stat().st_mtime - 90_000
    os.utime(failure, (yesterday, yesterday))
    with pytest.warns(RuntimeWarning, match="running slower without them"):
        load()
    assert (tmp_path / "runs").read_text() != runs


def test_a_server_without_its_cache_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    save_tiny_gguf(tmp_path / "model.gguf", tiny_model("llama"))
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("DISPEC_CPU_KERNELS", "off")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as short:  # tmp_path may be too long for sockets
        monkeypatch.setenv("TMPDIR", short)

        def substitutes() -> set[Path]:
            return set(Path(short).glob("dispec-cache-*"))

        with server(tmp_path, tmp_path / "model.gguf") as running_server:
            first = substitutes()
            assert len(first) == 1
            running_server.engine_process().kill()
            wait_for(lambda: substitutes() and not first & substitutes(), "removal by the engine that follows")
            wait_for(lambda: running_server.get("/health").status_code == 200, "readiness")
            running_server.process.terminate()
            assert running_server.process.wait() == 0
            assert substitutes() == set()
