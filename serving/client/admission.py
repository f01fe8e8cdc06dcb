"""How much may wait: a bounded queue of requests and prompt tokens, and when to come back if it is full."""

import math
import time
from collections import deque

from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.engine_errors import Overloaded

_LONGEST_WAIT = 60


class Admission:
    """Counts the requests that the engine has not started yet.

    max_requests, max_tokens: most of them, and of their prompts' tokens. A prompt that is longer than max_tokens is
    taken when nothing else waits: otherwise it never would be.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._waiting: dict[str, int] = {}
        self._latest_starts: dict[str, float] = {}
        self._starts: deque[float] = deque(maxlen=64)
        self.num_tokens = 0

    @property
    def num_requests(self) -> int:
        return len(self._waiting)

    def tokens_before(self, latest_start: float) -> int:
        """Prompt tokens that wait and go before a request which must begin then."""
        return sum(self._waiting[key] for key, own in self._latest_starts.items() if own <= latest_start)

    def enter(self, key: str, num_tokens: int, latest_start: float = 0.0) -> None:
        """Count a request in. Raises Overloaded."""
        if self.num_requests >= self._max_requests:
            raise Overloaded(f"{self.num_requests} requests are waiting, which is the most", self.retry_after())
        if self._waiting and self.num_tokens + num_tokens > self._max_tokens:
            raise Overloaded(
                f"{self.num_tokens} prompt tokens are waiting, this request would make them {num_tokens} more"
                f" (the most is {self._max_tokens})",
                self.retry_after(),
            )
        self._waiting[key] = num_tokens
        self._latest_starts[key] = latest_start
        self.num_tokens += num_tokens

    def leave(self, key: str, *, started: bool) -> None:
        """The engine has `started` a request, or it has ended before that. Twice is as good as once."""
        num_tokens = self._waiting.pop(key, None)
        if num_tokens is None:
            return
        del self._latest_starts[key]
        self.num_tokens -= num_tokens
        if started:
            self._starts.append(time.perf_counter())

    def retry_after(self) -> int:
        """Seconds in which those who wait now will have been started, at the rate of late; at least 1."""
        if len(self._starts) < 2:
            return 5
        rate = len(self._starts) / max(time.perf_counter() - self._starts[0], 1e-3)
        return min(max(math.ceil(self.num_requests / rate), 1), _LONGEST_WAIT)


class PromptRate:
    """How fast an engine computes prompts, from its last steps that did."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=64)

    def note(self, record: StepRecord) -> None:
        """A step has ended."""
        if record.num_prompt_tokens:
            self._steps.append((record.num_prompt_tokens, record.seconds))

    @property
    def tokens_per_second(self) -> float:
        """0 as long as that is not known."""
        seconds = sum(took for _, took in self._steps)
        return sum(count for count, _ in self._steps) / seconds if seconds else 0.0
