"""What tells one machine from another, and sockets that reach only this one.

The name of an abstract Unix socket is random and vanishes with its process. Whoever connects must run as the same user
(SO_PEERCRED), before the handshake that every connection has.
"""

import os
import secrets
import socket
import struct
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_id() -> str:
    """Of the running kernel; empty where it has none, which is like no other."""
    return _BOOT_ID.read_text(encoding="ascii").strip() if _BOOT_ID.exists() else ""


def user_id() -> int:
    return os.getuid() if hasattr(os, "getuid") else -1


def listen_locally() -> tuple[socket.socket, str]:
    """A socket for processes of this machine, and the name that leads to it. Raises OSError where there is none."""
    name = f"dispec-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind("\0" + name)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener, name


def connect_locally(name: str, timeout: float) -> socket.socket:
    """Raises OSError if nobody listens there: another network namespace has other names."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        sock.connect("\0" + name)
        check_same_user(sock)
    except OSError:
        sock.close()
        raise
    return sock


def check_same_user(sock: socket.socket) -> None:
    """Raises PermissionError if the process at the other end runs as another user."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.getuid():
        raise PermissionError(f"the process at the other end runs as user {user}")
