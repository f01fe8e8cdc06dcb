"""A temporary directory that goes with the process that made it.

A process that is killed cannot remove its directory. So each is locked by its owner, and an owner that makes a new one
removes those of its user that have the same prefix and are not locked any more.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

log = logging.getLogger("dispec")

_SECONDS_TO_LOCK = 60.0  # a directory after it was made, however busy the machine is


class OwnedDirectory:
    """Exists until `remove` is called. parent: None is the system's place for temporary files."""

    def __init__(self, prefix: str, parent: str | None = None) -> None:
        _remove_abandoned(prefix, parent or tempfile.gettempdir())
        self.path = tempfile.mkdtemp(prefix=prefix, dir=parent)
        # Held by this process and none that it starts: descriptors are not inherited.
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Doing it twice does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _remove_abandoned(prefix: str, parent: str) -> None:
    """Remove the directories of this user whose owner is gone."""
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
            # An empty one may have been made this moment, and is about to be locked.
            if os.listdir(directory) or time.time() - status.st_mtime > _SECONDS_TO_LOCK:
                shutil.rmtree(path, ignore_errors=True)
                log.info("removed %s, which a process that was killed had left behind", path)
        except OSError:  # locked: its owner lives
            continue
        finally:
            os.close(directory)
