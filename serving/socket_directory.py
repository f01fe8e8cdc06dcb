"""A private directory for the sockets of one engine process, which goes with the process that made it.

A server that is killed together with its engine cannot remove it. So each directory is locked by its owner, and an
owner that makes a new one removes those of its user that are not locked any more.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

log = logging.getLogger("dispec")

_PREFIX = "dispec-sockets-"
_LONGEST_NAME = len("/to-engine")
_LONGEST_SOCKET_PATH = 100  # the system's limit is 104 to 108 bytes


class SocketDirectory:
    """Exists until `remove` is called."""

    def __init__(self) -> None:
        _remove_abandoned(_parent())
        self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=_parent())
        # Held by this process and none that it starts: descriptors are not inherited.
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Doing it twice does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _parent() -> str:
    """Where the system keeps what is temporary, if socket paths there are short enough."""
    parent = tempfile.gettempdir()
    longest = len(os.path.join(parent, _PREFIX)) + 8 + _LONGEST_NAME  # mkdtemp adds 8 characters
    return parent if longest <= _LONGEST_SOCKET_PATH else "/tmp"


def _remove_abandoned(parent: str) -> None:
    """Remove the directories of this user whose owner is gone."""
    for path in Path(parent).glob(f"{_PREFIX}*"):
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if os.fstat(directory).st_uid != os.getuid():
                continue
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.listdir(directory):  # an empty one may have been made this moment, and is about to be locked
                shutil.rmtree(path, ignore_errors=True)
                log.info("removed %s, which a server that was killed had left behind", path)
        except OSError:  # locked: its owner lives
            continue
        finally:
            os.close(directory)
