"""The data of the dashboard: the last hour in buckets of time, the last steps, and the requests.

No task runs here. Events are added to the current second; a page asks for views.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.engine_client import EngineClient, EngineObserver
from dispec.serving.client.request_stream import RequestStream
from dispec.serving.dashboard.engine_list import engine_name, engines_of
from dispec.serving.dashboard.request_rows import RequestRows
from dispec.serving.dashboard.time_buckets import RANGES, Bucket, History, latencies, total

STEPS = 80
_SAMPLE_SECONDS = 0.1  # between two readings of the unfinished requests, which take microseconds for each


class DashboardState(EngineObserver):
    """Observes a client. `clock` is the one that steps and requests are timed by. num_steps: seen so far."""

    def __init__(self, client: EngineClient, clock: Callable[[], float] = time.perf_counter) -> None:
        self._client = client
        self._clock = clock
        self._started = clock()
        self._epoch = time.time() - self._started
        self._history = History(self._now())
        self._steps: deque[dict[str, Any]] = deque(maxlen=STEPS)
        self.num_steps = 0
        self._requests = RequestRows(self._epoch, lambda stream: engine_name(client, stream))
        self._seen: dict[str, tuple[int, int]] = {}  # tokens and gaps of unfinished requests that are counted, by key
        self._last_sample = float("-inf")
        self._speculates = False
        client.observers.append(self)

    def on_step(self, record: StepRecord, finished: float) -> None:
        second = self._history.second(self._now())
        second.computed += record.num_prompt_tokens
        second.cached += record.num_cached_tokens
        second.preemptions += record.num_preempted
        second.busy += record.seconds
        self.num_steps += 1
        self._steps.append(
            {
                "number": self.num_steps,
                "prefill": record.num_prompt_tokens,
                "decode": record.num_decoded_tokens,
                "seconds": record.seconds,
            }
        )
        if record.num_drafts:
            self.on_drafts(record.num_drafts, record.num_draft_tokens, record.num_accepted_per_position)
        self._sample()

    def on_first_token(self, stream: RequestStream) -> None:
        second = self._history.second(self._now())
        second.prompt += stream.num_prompt_tokens
        second.prompt_cached += stream.num_cached_tokens
        second.ttft.add([stream.timing.ttft])
        second.queue.add([stream.timing.queue])

    def on_request_finished(self, stream: RequestStream) -> None:
        second = self._history.second(self._now())
        self._count_tokens(second, stream)
        self._seen.pop(stream.key, None)
        second.errors += self._requests.add_ended(stream)
        second.finished += 1
        if stream.has_started:  # else it says nothing about the speed of requests
            second.e2e.add([stream.timing.total])
        self._sample()

    def on_refused(self) -> None:
        self._history.second(self._now()).refused += 1

    def on_drafts(self, num_drafts: int, num_draft_tokens: int, accepted_per_position: Sequence[int]) -> None:
        self._speculates = True
        second = self._history.second(self._now())
        second.drafts += num_drafts
        second.draft_tokens += num_draft_tokens
        second.accepted += sum(accepted_per_position)

    def views(self, range_name: str) -> Iterator[dict[str, Any]]:
        """Yield a range of `RANGES` to one page, then at each call the changes since the last."""
        at, step, ended, is_first = 0, 0, 0, True
        while True:
            self._sample(at_once=True)
            points = self._history.points(range_name, at)
            view = {
                "first": is_first,
                "now": self._epoch + self._clock(),
                "range": RANGES[range_name]._asdict(),
                "points": points,
                "steps": [entry for entry in self._steps if entry["number"] > step],
                "unfinished": self._requests.unfinished(self._client.streams),
                "ended": self._requests.ended_after(ended),
                "num_unfinished": self._client.load,
                "num_ended": self._requests.num_ended,
                "num_errors": self._requests.num_errors,
                "uptime": self._clock() - self._started,
                "summary": self._summary(range_name),
            }
            at = points[-1]["at"] if points else at
            step, ended, is_first = self.num_steps, self._requests.num_ended, False
            yield view

    def _now(self) -> int:
        return int(self._epoch + self._clock())

    def _sample(self, *, at_once: bool = False) -> None:
        """Read the unfinished requests, if the last reading is old or none is left."""
        now = self._clock()
        if now - self._last_sample < _SAMPLE_SECONDS and self._client.load and not at_once:
            return
        self._last_sample = now
        second = self._history.second(self._now())
        for stream in self._client.streams:
            self._count_tokens(second, stream)
        self._history.set_levels(
            self._now(),
            running=self._client.num_running,
            waiting=self._client.num_waiting,
            kv_usage=self._client.kv_usage,
        )

    def _count_tokens(self, second: Bucket, stream: RequestStream) -> None:
        """Count the tokens and gaps of a request since the last call."""
        num_tokens, num_gaps = self._seen.get(stream.key, (0, 0))
        if stream.num_output_tokens > num_tokens:
            second.output += stream.num_output_tokens - num_tokens
            second.itl.add(stream.gaps[num_gaps:])
            self._seen[stream.key] = stream.num_output_tokens, len(stream.gaps)

    def _summary(self, range_name: str) -> dict[str, Any]:
        """Return rates of the last seconds, and sums and percentiles of the range."""
        window, recent = self._history.window(range_name), self._history.recent()
        seconds = max(min(RANGES[range_name].span, self._clock() - self._started), 1.0)
        prompt, drafts = total(window, "prompt"), total(window, "drafts")
        speculation = {
            "rate": total(window, "accepted") / max(1, total(window, "draft_tokens")),
            "accepted_per_draft": total(window, "accepted") / max(1, drafts),
        }
        return {
            "output": total(recent, "output") / max(1, len(recent)),
            "input": (total(recent, "computed") + total(recent, "cached")) / max(1, len(recent)),
            "finished": total(window, "finished") / seconds,
            "busy": total(window, "busy") / seconds / max(1, len(engines_of(self._client))),
            **{name: total(window, name) for name in ("errors", "refused", "preemptions")},
            **latencies(window),
            "hit_rate": total(window, "prompt_cached") / prompt if prompt else None,
            "speculation": speculation if self._speculates else None,
        }
