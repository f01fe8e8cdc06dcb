"""A lock that threads acquire in the order of asking."""

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """A mutual exclusion lock that passes from its holder to the thread that has waited longest.

    A thread that acquires a `threading.Lock` again right after its release nearly always gets it, even if others wait:
    a thread that runs step after step would starve all others.
    """

    def __init__(self) -> None:
        # Reentrant, because a generator that is collected while it is held may acquire the lock in the same thread.
        self._state = threading.RLock()
        self._waiting: deque[threading.Lock] = deque()
        self._is_held = False

    def acquire(self, blocking: bool = True) -> bool:
        """Acquire the lock, and return True; without `blocking`, return False if it is held."""
        with self._state:
            if not self._is_held:
                self._is_held = True
                return True
            if not blocking:
                return False
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:  # Ctrl-C while waiting
            with self._state:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self.release()
            raise
        return True

    def release(self) -> None:
        """Pass the lock to the thread that has waited longest, if one waits."""
        with self._state:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()
