"""The order in which the steps of several workers use the cores of one machine.

Each worker runs its steps with all cores. A decode step beside a prefill step would take half of them, and prompts
would take twice as long as in one engine. A nice value of 10 for decode workers is not enough: with four streams of 128
tokens on two cores, the 95th percentile of the time to the first token was 1.6 to 1.7 times that of one engine.
"""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dispec.engine.process.messages import Role

# Of the duration of a decode step, to the next one, while a prompt is computed. On two cores of a Zen 5 with 16
# streams of 128 tokens, the 95th percentile of the time to the first token was 2.1 times that of one engine without the
# wait, 1.6 with 2.
_WAIT_PER_STEP = 4.0
# A step that computes a prompt again, after a failed transfer or a preemption, may take seconds: four times as long
# would stop all streams of the worker.
_MAX_WAIT_SECONDS = 2.0
_POLL_SECONDS = 0.001


class CorePriority:
    """Gives the steps of prefill workers precedence over those of decode workers.

    path: of a file that all workers of the machine have; a worker that ends leaves no lock behind.
    clock, sleep: the time, replaced in tests.
    """

    def __init__(
        self,
        path: str,
        role: Role,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  # its locks end with this object
        self._role = role
        self._clock = clock
        self._sleep = sleep

    @contextmanager
    def step(self) -> Iterator[None]:
        """Hold during a step. After a decode step it waits while a prefill worker has one, for at most four times as
        long as the decode step took, and at most two seconds."""
        if self._role == "prefill":
            fcntl.flock(self._file, fcntl.LOCK_SH)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
            return
        began = self._clock()
        yield
        ended = self._clock()
        deadline = ended + min(_WAIT_PER_STEP * (ended - began), _MAX_WAIT_SECONDS)
        while self._clock() < deadline and self._is_prefilling():
            self._sleep(_POLL_SECONDS)

    def _is_prefilling(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return False
