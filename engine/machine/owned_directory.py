"""A temporary directory that lives as long as the process that made it.

The process locks its directory. A killed process cannot remove its own: the next one with the same prefix removes the
user's directories that nothing locks any more.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

log = logging.getLogger("dispec")

_SECONDS_TO_LOCK = 60.0  # a new directory, on a busy machine


class OwnedDirectory:
    """A directory that exists until `remove` is called. parent: None is the system's directory for temporary files."""

    def __init__(self, prefix: str, parent: str | None = None) -> None:
        _remove_abandoned(prefix, parent or tempfile.gettempdir())
        self.path = tempfile.mkdtemp(prefix=prefix, dir=parent)
        # Child processes do not inherit the descriptor, so the lock ends with this process.
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove the directory, if that was not done before."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _remove_abandoned(prefix: str, parent: str) -> None:
    """Remove this user's directories that no process locks."""
    for path in Path(parent).glob(f"{prefix}*"):
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            status = os.fstat(directory)
            if status.st_uid != os.getuid():
                continue
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # An empty one may be new, and not locked yet.
            if os.listdir(directory) or time.time() - status.st_mtime > _SECONDS_TO_LOCK:
                shutil.rmtree(path, ignore_errors=True)
                log.info("removed %s, left behind by a killed process", path)
        except OSError:  # locked
            continue
        finally:
            os.close(directory)
