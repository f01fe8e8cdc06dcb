"""Resident memory and CPU time of running processes, read from the system."""

from pathlib import Path

import psutil


def peak_bytes(pid: int) -> int:
    """Return the peak resident bytes of a process and its children, summed; 0 after it has ended.

    Not the kernel's account at its end: that includes what the parent held before it became this program.
    """
    return sum(_peak(process.pid) for process in _tree(pid))


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process and its children."""
    total = 0.0
    for process in _tree(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def machine_cpu_seconds() -> float:
    """Return the CPU seconds of all processes of the machine."""
    times = psutil.cpu_times()
    return times.user + times.system + times.nice


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _peak(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
