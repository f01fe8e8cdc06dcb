"""`bench contention`: what it counts, and that its busy processes end with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dispec.bench.contention import busy_processes, spans

ROOT = Path(__file__).parent.parent


def test_tokens_are_counted_in_spans_of_five_seconds():
    assert spans([0.1, 4.9, 5.0, 7.0, 12.0, 15.1], 15) == [0.4, 0.4, 0.2]


def test_busy_processes_run_until_the_end():
    before = set(psutil.Process().children())
    with busy_processes(2):
        started = set(psutil.Process().children()) - before
        assert len(started) == 2
        assert all(process.is_running() for process in started)
    assert not any(process.is_running() for process in started)


@pytest.mark.slow
def test_a_short_run_leaves_its_figures(tmp_path):
    command = [sys.executable, "-m", "dispec.bench.contention", "--tokens", "8", "--rounds", "1", "--seconds", "1"]
    command += ["--output", str(tmp_path / "found")]
    environment = os.environ | {"DISPEC_CPU_KERNELS": "off"}  # with a cold cache the server would build them
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "found").read_text().splitlines()]
    assert [one["case"] for one in found[2:]] == [{"cache": "cold", "second": 0}, {"cache": "warm", "second": 0}]
    assert found[0]["case"] == {"neighbours": "quiet"}
    for one in found:
        rates = one["figures"]["tokens_per_second"]
        assert min(rates if isinstance(rates, list) else [rates]) > 0
