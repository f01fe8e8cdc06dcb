"""The data of the dashboard: the last minutes by second, the last steps, and the last requests.

No task runs here. Events are added to the current second; a page asks for views.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.engine_client import EngineClient, EngineObserver
from dispec.serving.client.request_stream import RequestStream
from dispec.serving.observability.distribution import Distribution, geometric, percentiles

SPAN = 120  # seconds
STEPS = 80
REQUESTS = 14
_RECENT = 10  # seconds of observations in the percentiles of one second
_NOW = 30  # seconds of observations in the current percentiles
_EDGES = geometric(1e-4, 200, per_decade=40)
_SHARES = (0.5, 0.95)


@dataclass
class Second:
    """Counts between second `at` of the clock and the next. running, waiting: at its end."""

    at: int
    output: int = 0
    computed: int = 0
    cached: int = 0
    prompt: int = 0
    prompt_cached: int = 0
    running: int = 0
    waiting: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted: int = 0
    first_tokens: Distribution = field(default_factory=lambda: Distribution(_EDGES))
    gaps: Distribution = field(default_factory=lambda: Distribution(_EDGES))


class DashboardState(EngineObserver):
    """A sliding window over an engine's events. `clock` is the one that steps and requests are timed by."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._client: EngineClient | None = None
        self._clock = clock
        self._epoch = time.time() - clock()
        self._last_step: float | None = None
        self._seconds: deque[Second] = deque([Second(int(self._epoch + clock()))], maxlen=SPAN)
        self._steps: deque[dict[str, Any]] = deque(maxlen=STEPS)
        self._num_steps = 0
        self._requests: deque[dict[str, Any]] = deque(maxlen=REQUESTS)
        self._num_requests = 0
        self._speculates = False

    def attach(self, client: EngineClient) -> None:
        """Observe a client."""
        self._client = client
        if self not in client.observers:
            client.observers.append(self)

    def on_step(self, record: StepRecord, finished: float) -> None:
        decode = record.num_decoded_tokens
        second = self._second()
        second.output += decode
        second.computed += record.num_prompt_tokens
        second.cached += record.num_cached_tokens
        # The counts of a step are those of its beginning, and no step follows the last one to report its end.
        is_last = self._client is not None and not self._client.load
        second.running = 0 if is_last else record.num_running
        second.waiting = 0 if is_last else record.num_waiting
        if decode and self._last_step is not None:
            # A sequence that decodes got its previous token from the step before, so the engine was not idle between.
            num_accepted = sum(record.num_accepted_per_position)
            second.gaps.add([finished - self._last_step] * (decode - num_accepted) + [0.0] * num_accepted)
        self._last_step = finished
        self._num_steps += 1
        self._steps.append(
            {
                "number": self._num_steps,
                "prefill": record.num_prompt_tokens,
                "decode": decode,
                "seconds": record.seconds,
            }
        )
        if record.num_drafts:
            self.on_drafts(record.num_drafts, record.num_draft_tokens, record.num_accepted_per_position)

    def on_first_token(self, stream: RequestStream) -> None:
        second = self._second()
        second.prompt += stream.num_prompt_tokens
        second.prompt_cached += stream.num_cached_tokens
        second.first_tokens.add([stream.timing.ttft])

    def on_request_finished(self, stream: RequestStream) -> None:
        timing = stream.timing
        second = self._second()
        if self._client is not None and not self._client.load:
            second.running = second.waiting = 0
        self._num_requests += 1
        self._requests.append(
            {
                "number": self._num_requests,
                "id": stream.request.request_id,
                "at": self._epoch + (timing.finished or self._clock()),
                "prompt": stream.num_prompt_tokens,
                "output": stream.num_output_tokens,
                "reason": " ".join(dict.fromkeys(reason for reason in stream.finish_reasons if reason)),
                "error": None if stream.error is None else str(stream.error),
                "queue": timing.queue,
                "prefill": timing.prefill,
                "decode": timing.decode,
            }
        )

    def on_drafts(self, num_drafts: int, num_draft_tokens: int, accepted_per_position: Sequence[int]) -> None:
        self._speculates = True
        second = self._second()
        second.drafts += num_drafts
        second.draft_tokens += num_draft_tokens
        second.accepted += sum(accepted_per_position)

    def views(self) -> Iterator[dict[str, Any]]:
        """Yield the whole window to one page, then at each call the changes since the last."""
        at, step, request, first = 0, 0, 0, True
        while True:
            current = self._second().at
            seconds = [second for second in self._seconds if at < second.at < current]
            steps = [entry for entry in self._steps if entry["number"] > step]
            requests = [entry for entry in self._requests if entry["number"] > request]
            at = seconds[-1].at if seconds else at
            step, request = self._num_steps, self._num_requests
            yield {
                "first": first,
                "now": self._epoch + self._clock(),
                "seconds": [self._point(second) for second in seconds],
                "steps": steps,
                "requests": requests,
                **self._summary(),
            }
            first = False

    def _second(self) -> Second:
        """Return the current second, after adding those without events since the last one."""
        current = int(self._epoch + self._clock())
        last = self._seconds[-1]
        for at in range(max(last.at + 1, current - SPAN + 1), current + 1):
            self._seconds.append(Second(at, running=last.running, waiting=last.waiting))
        return self._seconds[-1]

    def _point(self, second: Second) -> dict[str, Any]:
        recent = [other for other in self._seconds if second.at - _RECENT < other.at <= second.at]
        names = ("at", "output", "computed", "cached", "running", "waiting")
        return {name: getattr(second, name) for name in names} | self._latencies(recent)

    @staticmethod
    def _latencies(seconds: Sequence[Second]) -> dict[str, list[float] | None]:
        """Return median and 95th percentile of the time to the first token and between tokens."""
        return {
            "ttft": percentiles((second.first_tokens for second in seconds), _SHARES),
            "gap": percentiles((second.gaps for second in seconds), _SHARES),
        }

    def _summary(self) -> dict[str, Any]:
        prompt, cached, drafts, tokens, accepted = (
            sum(getattr(second, name) for second in self._seconds)
            for name in ("prompt", "prompt_cached", "drafts", "draft_tokens", "accepted")
        )
        speculation = {"rate": accepted / max(1, tokens), "accepted_per_draft": accepted / max(1, drafts)}
        return {
            **self._latencies(list(self._seconds)[-_NOW:]),
            "hit_rate": cached / prompt if prompt else None,
            "speculation": speculation if self._speculates else None,
        }
