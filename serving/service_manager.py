"""Reports the server's state to systemd, by the protocol of sd_notify(3): datagrams of assignments to NOTIFY_SOCKET."""

import asyncio
import contextlib
import os
import socket


def notify(*assignments: str) -> None:
    """Send assignments such as "READY=1" to the service manager that started this process. Without one, do nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):  # a path, or a name in Linux's abstract namespace
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
        channel.setblocking(False)  # the event loop sends
        channel.sendto("\n".join(assignments).encode(), address)


async def feed_watchdog() -> None:
    """Report twice per WatchdogSec that the event loop runs. Return at once if the service manager has no watchdog."""
    own = str(os.getpid())
    if os.environ.get("WATCHDOG_PID", own) != own:
        return
    seconds = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    while seconds > 0:
        notify("WATCHDOG=1")
        await asyncio.sleep(seconds / 2)
