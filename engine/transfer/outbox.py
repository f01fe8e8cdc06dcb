"""What is to be sent over a connection, in order, by a thread of its own: nobody else waits for the network."""

import logging
import queue
import threading
from collections.abc import Callable

from dispec.engine.transfer.wire import Connection

log = logging.getLogger(__name__)

MAX_WAITING = 16384  # a peer that asks more than it reads is not served any more

Job = Callable[[Connection], None]


class Outbox:
    """Every job is run once, after a failure as well: those still waiting then find the connection closed."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        if self._jobs.qsize() > MAX_WAITING:
            self._connection.abort()
        self._jobs.put(job)

    def close(self) -> None:
        """Wait until all jobs have run, quickly since the connection is closed first."""
        self._connection.abort()
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job(self._connection)
            except ConnectionError:
                self._connection.abort()
            except Exception:
                log.exception("cannot send KV blocks")
                self._connection.abort()
