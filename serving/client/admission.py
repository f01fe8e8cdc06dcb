"""The bounded queue before an engine: how many requests and prompt tokens may wait, and in which order they start."""

import math
import time
from collections import deque

from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.errors import Overloaded
from dispec.serving.client.slo import Slo, can_meet_ttft, slack

_MAX_RETRY_SECONDS = 60


class PrefillThroughput:
    """Prompt tokens per second of an engine, over its last steps that computed any."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=64)

    def observe(self, record: StepRecord) -> None:
        if record.num_prompt_tokens:
            self._steps.append((record.num_prompt_tokens, record.seconds))

    @property
    def tokens_per_second(self) -> float:
        """0 before the first such step."""
        seconds = sum(took for _, took in self._steps)
        return sum(count for count, _ in self._steps) / seconds if seconds else 0.0


class Admission:
    """Counts the requests that the engine has not started.

    max_requests, max_tokens: most of them, and of their prompt tokens. A prompt longer than max_tokens is admitted only
    while no other request waits.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._waiting: dict[str, tuple[int, float]] = {}  # prompt tokens and latest start, by key
        self._start_times: deque[float] = deque(maxlen=64)
        self._num_tokens = 0
        self.prefill_throughput = PrefillThroughput()

    def num_tokens_ahead(self, latest_start: float) -> int:
        """Return the waiting prompt tokens that go before a request with this latest start."""
        return sum(count for count, other in self._waiting.values() if other <= latest_start)

    def slack(self, slo: Slo | None, num_tokens: int) -> float:
        """Return the seconds that a prompt can wait. Raises Overloaded if its first token cannot come in time."""
        rate = self.prefill_throughput.tokens_per_second
        seconds = slack(slo, num_tokens, rate)
        ahead = self.num_tokens_ahead(time.perf_counter() + seconds)
        if slo is not None and not can_meet_ttft(slo, ahead + num_tokens, rate):
            raise Overloaded(
                f"the first token cannot come within {slo.ttft:g} s, the target of {slo.name!r}:"
                f" {ahead} prompt tokens are ahead of this request",
                self.retry_after(),
            )
        return seconds

    def enter(self, key: str, num_tokens: int, latest_start: float = 0.0) -> None:
        """Count a request. Raises Overloaded if the queue is full."""
        if len(self._waiting) >= self._max_requests:
            raise Overloaded(f"{len(self._waiting)} requests are waiting, which is the most", self.retry_after())
        if self._waiting and self._num_tokens + num_tokens > self._max_tokens:
            raise Overloaded(
                f"{self._num_tokens} prompt tokens are waiting, this request would make them {num_tokens} more"
                f" (the most is {self._max_tokens})",
                self.retry_after(),
            )
        self._waiting[key] = num_tokens, latest_start
        self._num_tokens += num_tokens

    def leave(self, key: str, *, started: bool) -> None:
        """Remove a request that the engine has `started`, or that ended before. A second call does nothing."""
        if key not in self._waiting:
            return
        self._num_tokens -= self._waiting.pop(key)[0]
        if started:
            self._start_times.append(time.perf_counter())

    def retry_after(self) -> int:
        """Return the seconds, at least 1, until the waiting requests will have started at the recent rate."""
        if len(self._start_times) < 2:
            return 5
        rate = len(self._start_times) / max(time.perf_counter() - self._start_times[0], 1e-3)
        return min(max(math.ceil(len(self._waiting) / rate), 1), _MAX_RETRY_SECONDS)
