"""The number of cores that this process may use. Imports no torch."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Return the cores in the process's affinity mask, or in its cgroups' CPU quota if these are fewer; at least 1.

    Hyperthreads of one core count once, since they share its units and its path to memory; but if the mask has one core
    alone, all its hyperthreads count. A quota is rounded to whole cores: with one of 1.5 on a Zen 5, two threads decode
    one sequence as fast as one thread, compute prompts 1.45 times as fast, and stop for 25 ms in each 100 ms. root: of
    /proc and /sys.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cpus = os.sched_getaffinity(0) if has_affinity else set(range(os.cpu_count() or 1))
    cores = {_first_sibling(cpu, root) for cpu in cpus}
    return max(1, math.floor(min([len(cores) if len(cores) > 1 else len(cpus), *_quotas(root)]) + 0.5))


def _first_sibling(cpu: int, root: Path) -> str:
    """Return the first hyperthread of a CPU's core (Linux: admin-guide/cputopology.rst), the CPU if that is unknown."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")  # such as "3,67" or "0-1"
    return re.split("[,-]", siblings.strip())[0] or str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """Yield CPU quotas, in cores, of the process's cgroups and their parents (Linux: admin-guide/cgroup-v2.rst)."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path:  # not a cgroup
            continue
        if not controllers:
            mounts, names = [root / "sys/fs/cgroup"], ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / name for name in (controllers, "cpu")]
            names = ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        for mount in mounts:
            # In a container the mount may be the process's own group, and the path does not exist.
            for group in (mount, *(mount.joinpath(*parts) for parts in _prefixes(path))):
                words = " ".join(_read(group / name) for name in names).split()
                if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):  # not "max", not -1
                    yield int(words[0]) / int(words[1])


def _prefixes(path: str) -> Iterator[list[str]]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return (parts[: count + 1] for count in range(len(parts)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
