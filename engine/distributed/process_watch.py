"""A thread that notices the end of a process while other threads wait for a GPU."""

import os
import select
import threading
from collections.abc import Callable, Iterable

_CALL_SECONDS = 5.0  # for a call that has begun when the watch is closed


class ProcessWatch:
    """Calls a function, in a thread of its own, when the first of several processes ends.

    Does nothing on systems without pidfds.
    """

    def __init__(self, pids: Iterable[int], on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._pidfds = [os.pidfd_open(pid) for pid in pids] if hasattr(os, "pidfd_open") else []
        self._closing, self._closer = os.pipe()
        self._lock = threading.Lock()
        self._is_over = False
        self._thread = threading.Thread(target=self._watch, name="process watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching: no call begins after this returns. Waits up to 5 s for a call that has begun."""
        with self._lock:
            self._is_over = True
        os.close(self._closer)  # ends the thread, which closes the others
        self._thread.join(_CALL_SECONDS)

    def _watch(self) -> None:
        fds = (self._closing, *self._pidfds)
        poll = select.poll()  # takes file descriptors of any number
        for fd in fds:
            poll.register(fd, select.POLLIN)
        poll.poll()
        for fd in fds:
            os.close(fd)
        with self._lock:
            is_over, self._is_over = self._is_over, True
        if not is_over:
            self._on_end()
