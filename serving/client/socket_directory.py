"""A private directory for the sockets of one engine process, which goes with the process that made it."""

import os
import tempfile

from dispec.engine.machine.owned_directory import OwnedDirectory

_PREFIX = "dispec-sockets-"
_LONGEST_NAME = len("/to-engine")
_LONGEST_SOCKET_PATH = 100  # the system's limit is 104 to 108 bytes


class SocketDirectory(OwnedDirectory):
    """Exists until `remove` is called."""

    def __init__(self) -> None:
        super().__init__(_PREFIX, _parent())


def _parent() -> str:
    """Where the system keeps what is temporary, if socket paths there are short enough."""
    parent = tempfile.gettempdir()
    longest = len(os.path.join(parent, _PREFIX)) + 8 + _LONGEST_NAME  # mkdtemp adds 8 characters
    return parent if longest <= _LONGEST_SOCKET_PATH else "/tmp"
