"""The number of cores that this process may use. Imports no torch."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dispec.engine.machine.control_groups import control_groups, read_text


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
    siblings = read_text(topology / "core_cpus_list") or read_text(
        topology / "thread_siblings_list"
    )  # such as "3,67" or "0-1"
    return re.split("[,-]", siblings.strip())[0] or str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """Yield CPU quotas, in cores, of the process's cgroups and their parents."""
    for group, version in control_groups("cpu", root):
        names = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        words = " ".join(read_text(group / name) for name in names).split()
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):  # not "max", not -1
            yield int(words[0]) / int(words[1])
