"""Free memory: that of the machine, or of the cgroup with the least."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dispec.engine.machine import memory
from dispec.engine.machine.memory import usable_memory

GIB = 2**30
V1 = "sys/fs/cgroup/memory/docker/x"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, (20, 24)),
        ("0::/", {"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"}, (20, 24)),
        ("0::/app", {"sys/fs/cgroup/app/memory.max": 8 * GIB, "sys/fs/cgroup/app/memory.current": 3 * GIB}, (5, 8)),
        (
            "0::/app",
            {
                "sys/fs/cgroup/app/memory.max": 8 * GIB,
                "sys/fs/cgroup/app/memory.current": 7 * GIB,
                "sys/fs/cgroup/app/memory.stat": f"anon 5\nactive_file {GIB}\ninactive_file {2 * GIB}\nrest 1",
            },
            (4, 8),
        ),
        (  # the parent has less
            "0::/pod/app",
            {
                "sys/fs/cgroup/pod/memory.max": 4 * GIB,
                "sys/fs/cgroup/pod/memory.current": 3 * GIB,
                "sys/fs/cgroup/pod/app/memory.max": 8 * GIB,
                "sys/fs/cgroup/pod/app/memory.current": 2 * GIB,
            },
            (1, 4),
        ),
        (  # a group that uses more than its limit, as after the limit was lowered
            "0::/",
            {"sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": 2 * GIB},
            (0, 1),
        ),
        (  # the machine has less
            "0::/",
            {"sys/fs/cgroup/memory.max": 64 * GIB, "sys/fs/cgroup/memory.current": 0},
            (20, 24),
        ),
        (
            "4:memory:/docker/x\n3:cpu:/docker/x\n0::/",
            {
                f"{V1}/memory.limit_in_bytes": 8 * GIB,
                f"{V1}/memory.usage_in_bytes": 6 * GIB,
                f"{V1}/memory.stat": f"inactive_file 9\ntotal_active_file 0\ntotal_inactive_file {GIB}",
            },
            (3, 8),
        ),
        (
            "4:memory:/docker/x",
            {f"{V1}/memory.limit_in_bytes": 9223372036854771712, f"{V1}/memory.usage_in_bytes": GIB},
            (20, 24),
        ),
    ],
)
def test_the_least_of_machine_and_cgroups(
    groups: str,
    files: dict[str, str | int],
    expected: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GIB, total=24 * GIB), raising=False
    )
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    available, total = usable_memory(tmp_path)
    assert (available // GIB, total // GIB) == expected
