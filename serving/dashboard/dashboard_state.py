"""What the dashboard shows: the last minutes by second, the last steps one by one, the last requests.

Nothing runs here by itself: what happens is added to the current second, and who looks asks for a view.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.engine_client import EngineClient, Listener
from dispec.serving.client.request_stream import FirstToken, RequestSummary, RequestTiming
from dispec.serving.cluster.worker_pool import WorkerPool
from dispec.serving.observability.distribution import Distribution, geometric, percentiles

SPAN = 120  # seconds
STEPS = 80
REQUESTS = 14
_RECENT = 10  # seconds whose observations make up the percentiles shown for one second
_NOW = 30  # seconds that count as now
_EDGES = geometric(1e-4, 200, per_decade=40)
_SHARES = (0.5, 0.95)


@dataclass
class Second:
    """What happened between second `at` of the clock and the next. running, waiting: at its end."""

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


class DashboardState(Listener):
    """The window. `clock` is the one that steps and requests are timed by."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._client: EngineClient | WorkerPool | None = None
        self._clock = clock
        self._epoch = time.time() - clock()
        self._last_step: float | None = None
        self._seconds: deque[Second] = deque([Second(int(self._epoch + clock()))], maxlen=SPAN)
        self._steps: deque[dict[str, Any]] = deque(maxlen=STEPS)
        self._num_steps = 0
        self._requests: deque[dict[str, Any]] = deque(maxlen=REQUESTS)
        self._num_requests = 0
        self._speculates = False

    def attach(self, client: EngineClient | WorkerPool) -> None:
        """Follow what happens to this client."""
        self._client = client
        if self not in client.listeners:
            client.listeners.append(self)

    def on_step(self, record: StepRecord, finished: float) -> None:
        decode = record.num_decoded_tokens
        second = self._second()
        second.output += decode
        second.computed += record.num_prompt_tokens
        second.cached += record.num_cached_tokens
        # The books of the step are those of its beginning; that it was the last for now, no later one will tell.
        is_last = self._client is not None and not self._client.load
        second.running = 0 if is_last else record.num_running
        second.waiting = 0 if is_last else record.num_waiting
        if decode and self._last_step is not None:
            # Whatever decodes had its last token from the step before, so nothing was idle in between.
            at_once = sum(record.num_accepted_per_position)
            second.gaps.add([finished - self._last_step] * (decode - at_once) + [0.0] * at_once)
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

    def on_first_token(self, first: FirstToken) -> None:
        second = self._second()
        second.prompt += first.prompt_tokens
        second.prompt_cached += first.cached_tokens
        second.first_tokens.add([first.seconds])

    def on_request_finished(self, summary: RequestSummary) -> None:
        timing = RequestTiming(summary.arrival, summary.started, summary.first_token, summary.finished)
        second = self._second()
        if self._client is not None and not self._client.load:
            second.running = second.waiting = 0
        self._num_requests += 1
        self._requests.append(
            {
                "number": self._num_requests,
                "id": summary.request_id,
                "at": self._epoch + summary.finished,
                "prompt": summary.prompt_tokens,
                "output": summary.output_tokens,
                "reason": " ".join(dict.fromkeys(summary.finish_reasons)),
                "error": summary.error,
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
        """For one looker: all that is kept, then at each call what is new since the last."""
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
        """The current second, after those without news since the last one."""
        current = int(self._epoch + self._clock())
        last = self._seconds[-1]
        for at in range(max(last.at + 1, current - SPAN + 1), current + 1):
            self._seconds.append(Second(at, running=last.running, waiting=last.waiting))
        return self._seconds[-1]

    def _point(self, second: Second) -> dict[str, Any]:
        recent = [other for other in self._seconds if second.at - _RECENT < other.at <= second.at]
        return {
            "at": second.at,
            "output": second.output,
            "computed": second.computed,
            "cached": second.cached,
            "running": second.running,
            "waiting": second.waiting,
            **self._latencies(recent),
        }

    @staticmethod
    def _latencies(seconds: Sequence[Second]) -> dict[str, list[float] | None]:
        """Median and 95th percentile of the time to the first token and of that between tokens."""
        return {
            "ttft": percentiles((second.first_tokens for second in seconds), _SHARES),
            "gap": percentiles((second.gaps for second in seconds), _SHARES),
        }

    def _summary(self) -> dict[str, Any]:
        seconds = self._seconds
        prompt = sum(second.prompt for second in seconds)
        return {
            **self._latencies(list(seconds)[-_NOW:]),
            "hit_rate": sum(second.prompt_cached for second in seconds) / prompt if prompt else None,
            "speculation": self._speculation(),
        }

    def _speculation(self) -> dict[str, float] | None:
        if not self._speculates:
            return None
        drafts, tokens, accepted = (
            sum(getattr(second, name) for second in self._seconds) for name in ("drafts", "draft_tokens", "accepted")
        )
        return {"rate": accepted / max(1, tokens), "accepted_per_draft": accepted / max(1, drafts)}
