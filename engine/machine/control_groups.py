"""The directories of this process's cgroups, of both versions (Linux: admin-guide/cgroup-v2.rst, cgroup-v1/)."""

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """Yield the directories of the process's cgroups with a controller and of their parents, each with its version.

    controller: `cpu` or `memory`. root: of /proc and /sys. A directory need not exist.
    """
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path:  # not a cgroup
            continue
        if not controllers:
            version, mounts = 2, [root / "sys/fs/cgroup"]
        elif controller in controllers.split(","):
            version, mounts = 1, [root / "sys/fs/cgroup" / name for name in {controllers, controller}]
        else:
            continue
        for mount in mounts:
            # In a container the mount may be the process's own group, and the path does not exist.
            for group in (mount, *(mount.joinpath(*parts) for parts in _prefixes(path))):
                yield group, version


def read_text(path: Path) -> str:
    """Return a file's text; nothing if it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _prefixes(path: str) -> Iterator[list[str]]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return (parts[: count + 1] for count in range(len(parts)))
