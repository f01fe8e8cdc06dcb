"""When an engine that died is started again, and when that is hopeless."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RestartPolicy:
    """The first restart is immediate, the next ones wait, each twice as long as the one before.

    max_restarts: in a row; an engine that dies once more stays dead. delay, max_delay: seconds before the second
    restart, and before any. healthy_seconds: of service, after which the count begins anew.
    """

    max_restarts: int = 5
    delay: float = 1.0
    max_delay: float = 30.0
    healthy_seconds: float = 60.0

    def seconds_before(self, num_restarts: int) -> float:
        """To wait before the next restart, after so many in a row."""
        if num_restarts == 0:
            return 0.0
        return min(self.delay * 2.0 ** (num_restarts - 1), self.max_delay)
