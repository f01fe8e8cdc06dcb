"""What happened over the last hour, in buckets of time: three series, which take less memory the further they reach.

Events are added to the current second. A second that is over is added to the open buckets of the wider series.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from dispec.serving.observability.distribution import Distribution, geometric, percentiles


class Range(NamedTuple):
    """A range of time that a page shows, and the width of its buckets, in seconds."""

    span: int
    width: int


RANGES = {"1m": Range(60, 1), "10m": Range(600, 5), "1h": Range(3600, 30)}
SMOOTHING = 10  # seconds of observations in the rates of "now", and at least so many in the percentiles of a point
LATENCIES = ("ttft", "itl", "e2e", "queue")
SHARES = (0.5, 0.95)
_EDGES = geometric(1e-4, 2000, per_decade=40)


def _distribution() -> Distribution:
    return Distribution(_EDGES)


@dataclass
class Bucket:
    """Counts of the events from second `at` of the clock on; of running, waiting and kv_usage, the highest values.

    output: generated tokens. computed, cached: prompt tokens that were computed, and found in the cache. prompt,
    prompt_cached: those of requests that got their first token. refused: requests that got 503 before they were queued.
    busy: seconds of steps. ttft, itl, e2e, queue: seconds.
    """

    at: int
    output: int = 0
    computed: int = 0
    cached: int = 0
    prompt: int = 0
    prompt_cached: int = 0
    finished: int = 0
    errors: int = 0
    refused: int = 0
    preemptions: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted: int = 0
    busy: float = 0.0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    ttft: Distribution = field(default_factory=_distribution)
    itl: Distribution = field(default_factory=_distribution)
    e2e: Distribution = field(default_factory=_distribution)
    queue: Distribution = field(default_factory=_distribution)

    def add(self, later: "Bucket") -> None:
        """Add the events of a shorter bucket."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for name in _PEAKS:
            setattr(self, name, max(getattr(self, name), getattr(later, name)))
        for name in LATENCIES:
            getattr(self, name).counts.update(getattr(later, name).counts)


_PEAKS = ("running", "waiting", "kv_usage")
_COUNTS = tuple(one.name for one in fields(Bucket) if one.name not in ("at", *_PEAKS, *LATENCIES))


class Series:
    """The buckets of one range: the open one, and those that are over."""

    def __init__(self, range_: Range, now: int) -> None:
        self.range = range_
        self.over: deque[Bucket] = deque(maxlen=range_.span // range_.width)
        self.open = Bucket(now - now % range_.width)

    def advance(self, now: int, levels: dict[str, float]) -> None:
        """Make the bucket of second `now` the open one. Those between get `levels` as their running, waiting and
        kv_usage."""
        width, start = self.range.width, now - now % self.range.width
        if start <= self.open.at:
            return
        self.over.append(self.open)
        first = max(self.open.at + width, start - self.range.span)
        for at in range(first, start + width, width):
            self.open = Bucket(at, **levels)  # type: ignore[arg-type]
            if at < start:
                self.over.append(self.open)


class History:
    """The series of all ranges. now: the whole seconds of a clock."""

    def __init__(self, now: int) -> None:
        self.series = {name: Series(range_, now) for name, range_ in RANGES.items()}
        self._seconds, *self._wider = self.series.values()
        self._levels: dict[str, float] = {"running": 0, "waiting": 0, "kv_usage": 0.0}

    def second(self, now: int) -> Bucket:
        """Return the bucket of the current second, which events are added to."""
        over = self._seconds.open
        if now > over.at:
            for series in self._wider:
                series.open.add(over)
                series.advance(now, self._levels)
            self._seconds.advance(now, self._levels)
        return self._seconds.open

    def set_levels(self, now: int, **levels: float) -> None:
        """Set running, waiting and kv_usage from now on."""
        second = self.second(now)
        self._levels = levels
        for name, value in levels.items():
            setattr(second, name, max(getattr(second, name), value))

    def points(self, name: str, after: int) -> list[dict[str, Any]]:
        """Return the buckets of a range that are over and begin after second `after`: counts as rates per second."""
        series = self.series[name]
        over, width = list(series.over), series.range.width
        # Percentiles of a point are over at least SMOOTHING seconds.
        num_recent = max(1, SMOOTHING // width)
        return [
            _point(width, over[max(0, index + 1 - num_recent) : index + 1])
            for index, bucket in enumerate(over)
            if bucket.at > after
        ]

    def window(self, name: str) -> list[Bucket]:
        """Return all buckets of a range, the open ones included."""
        series = self.series[name]
        return [*series.over, series.open, *([self._seconds.open] if series is not self._seconds else [])]

    def recent(self) -> list[Bucket]:
        """Return the last seconds that are over, at most SMOOTHING of them."""
        return list(self._seconds.over)[-SMOOTHING:]


def _point(width: int, recent: list[Bucket]) -> dict[str, Any]:
    """Return the last of these buckets, each `width` seconds long, with the latencies of all of them."""
    bucket = recent[-1]
    rates = {name: getattr(bucket, name) / width for name in ("output", "computed", "cached", "finished")}
    return {name: getattr(bucket, name) for name in ("at", *_PEAKS)} | rates | latencies(recent)


def latencies(buckets: Sequence[Bucket]) -> dict[str, list[float] | None]:
    """Return median and 95th percentile of each latency in seconds; None without observations."""
    return {name: percentiles((getattr(one, name) for one in buckets), SHARES) for name in LATENCIES}


def total(buckets: Iterable[Bucket], name: str) -> Any:
    """Return the sum of a count."""
    return sum(getattr(one, name) for one in buckets)
