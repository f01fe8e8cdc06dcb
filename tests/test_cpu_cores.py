"""The number of threads: what the user says, else the cores that affinity and CPU quotas leave to the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dispec.engine import options
from dispec.engine.compression import quantize_model
from dispec.engine.machine import cpu_cores
from dispec.engine.machine.cpu_cores import usable_cores
from dispec.engine.options import EngineOptions
from dispec.serving.cli.quantize import quantize
from tests.checkpoints import save_tiny
from tests.small_engine import make

ROOT = Path(__file__).parent.parent


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/", {}, 8),
        ("0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ("0::/app", {"sys/fs/cgroup/app/cpu.max": "350000 100000"}, 4),
        ("0::/app", {"sys/fs/cgroup/app/cpu.max": "340000 100000"}, 3),
        ("0::/app", {"sys/fs/cgroup/app/cpu.max": "50000 100000"}, 1),
        ("0::/app", {"sys/fs/cgroup/app/cpu.max": "10000 100000"}, 1),
        (
            "0::/pod/app",
            {"sys/fs/cgroup/pod/cpu.max": "200000 100000", "sys/fs/cgroup/pod/app/cpu.max": "max 100000"},
            2,
        ),
        ("0::/../app", {"sys/fs/cgroup/cpu.max": "600000 100000"}, 6),
        ("0::/app", {"sys/fs/cgroup/app/cpu.max": "9900000 100000"}, 8),
        (
            "4:memory:/m\n3:cpu,cpuacct:/docker/x\n0::/",
            {
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            "3:cpu:/x",
            {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000"},
            8,
        ),
        ("0::/my app", {"sys/fs/cgroup/my app/cpu.max": "350000 100000"}, 4),
        ("", {}, 8),
    ],
)
def test_quotas_of_both_kinds_of_cgroup(groups, files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_cores.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cpu_cores.usable_cores(system(tmp_path, groups, files)) == cores


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
@pytest.mark.parametrize(
    ("siblings", "mask", "cores"),
    [
        (["0,4", "1,5", "2,6", "3,7"] * 2, range(8), 4),
        (["0-1", "0-1", "2-3", "2-3"], range(4), 2),
        (["0", "1", "2"], range(3), 3),
        (["0-1", "0-1", "2-3", "2-3"], {1, 2}, 2),
        (["0-1", "0-1", "2-3", "2-3"], {2, 3}, 2),  # one core alone
        (["0-1", "0-1", "2"], range(3), 2),  # only the first core has hyperthreads
        (["0-1", "0-1"], range(4), 3),  # nothing is known of the others
        (["0-7"] * 8, range(8), 8),
        (["10,110", "10,110"], {0}, 1),
    ],
)
def test_hyperthreads_count_once(name, siblings, mask, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_cores.os, "sched_getaffinity", lambda _: set(mask), raising=False)
    files = {f"sys/devices/system/cpu/cpu{cpu}/topology/{name}": text for cpu, text in enumerate(siblings)}
    assert usable_cores(system(tmp_path, "0::/", files)) == cores
    assert usable_cores(system(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": "100000 100000"})) == 1


@pytest.mark.smoke
def test_affinity_counts(monkeypatch):
    monkeypatch.setattr(cpu_cores.os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert cpu_cores.usable_cores() == 1
    assert EngineOptions().num_threads() == 1
    assert EngineOptions(threads=5).num_threads() == 5


_SERVE = """
import json, sys
import dispec.serving.server
from dispec.engine.options import EngineOptions
dispec.serving.server.run = lambda settings, engine, **_: print(json.dumps(EngineOptions(**engine).num_threads())) or 0
from dispec.__main__ import main
main(["serve", "-q", *sys.argv[1:]])
"""


@pytest.mark.parametrize("way", ["flag", "variable", "file"])
def test_threads_by_flag_variable_and_file(way, tmp_path):
    (tmp_path / "dispec.toml").write_text("threads = 3\n")
    given = {"flag": ["--threads", "3"], "variable": [], "file": ["--config", str(tmp_path / "dispec.toml")]}[way]
    environment = os.environ | ({"DISPEC_THREADS": "3"} if way == "variable" else {})
    done = subprocess.run(
        [sys.executable, "-c", _SERVE, *given], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == 3


def test_the_threads_of_one_engine_are_no_default_for_the_next(tmp_path):
    save_tiny(tmp_path, "llama")
    before = torch.get_num_threads()
    try:
        for threads, expected in ((before + 2, before + 2), (None, min(before, usable_cores()))):
            make(tmp_path, threads=threads).close()
            assert torch.get_num_threads() == expected
        torch.set_num_threads(1)  # the user's own choice between two engines
        make(tmp_path).close()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_quantising_a_model_keeps_to_the_usable_cores(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(quantize_model, "quantize_model", lambda *_, **__: found.append(torch.get_num_threads()))
    monkeypatch.setattr(options, "usable_cores", lambda: 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        quantize("smollm2", tmp_path, quiet=True)
    finally:
        torch.set_num_threads(before)
    assert found == [1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
)
def test_how_openmp_waits_is_for_the_user_to_say(given, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    code = "import os, dispec; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().strip() == expected
