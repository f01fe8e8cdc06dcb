"""The memory that this process may use. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from dispec.engine.machine.control_groups import control_groups, read_text


class Memory(NamedTuple):
    """Bytes of memory. available: without swapping, the page cache included."""

    available: int
    total: int


def usable_memory(root: Path = Path("/")) -> Memory:
    """Return the memory of the machine, or that of the process's cgroup with the least if this is less.

    root: of /proc and /sys.
    """
    machine = psutil.virtual_memory()
    groups = list(_limited_groups(root))
    return Memory(
        min([machine.available, *(group.available for group in groups)]),
        min([machine.total, *(group.total for group in groups)]),
    )


def _limited_groups(root: Path) -> Iterator[Memory]:
    """Yield the memory of the process's cgroups and their parents that have a limit."""
    for group, version in control_groups("memory", root):
        limit_name, usage_name, prefix = (
            ("memory.max", "memory.current", "")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        )
        limit, usage = read_text(group / limit_name).strip(), read_text(group / usage_name).strip()
        if limit.isdigit() and usage.isdigit():  # not "max"
            stat = dict(line.split() for line in read_text(group / "memory.stat").splitlines() if line.count(" ") == 1)
            # Pages of files are given back when memory is short.
            files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield Memory(max(0, int(limit) - int(usage) + files), int(limit))
