"""Histograms that take lists of values, and the buckets of those that are exported.

`Metrics` keeps one for a process's life and the dashboard one for each second. Adding a list costs a tenth of calling
`prometheus_client.Histogram.observe` for each value, and there is a value for every token.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

# Upper edges in seconds; of TOKENS in tokens. The same in all servers and workers, so that histograms can be added up.
FIRST_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2)
REQUEST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800)
STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TOKENS = tuple(float(2**power) for power in range(18))


def geometric(lowest: float, highest: float, per_decade: int) -> list[float]:
    """Return upper edges of buckets from `lowest` on, the last of them at least `highest`."""
    edges = [lowest]
    while edges[-1] < highest:
        edges.append(lowest * 10 ** (len(edges) / per_decade))
    return edges


class Distribution:
    """Counts of values by bucket, and their sum. edges: ascending upper edges, each within its bucket; one more bucket
    has the values above the last edge."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = edges
        self.counts: Counter[int] = Counter()
        self.sum = 0.0

    def add(self, values: Sequence[float]) -> None:
        self.counts.update(map(partial(bisect_left, self.edges), values))
        self.sum += sum(values)

    def buckets(self) -> list[tuple[str, float]]:
        """Return Prometheus buckets: upper edges, and the number of values that are at most that."""
        found, buckets = 0, []
        for index, edge in enumerate([*map(float, self.edges), None]):
            found += self.counts[index]
            buckets.append(("+Inf" if edge is None else str(edge), float(found)))
        return buckets


def percentiles(parts: Iterable[Distribution], shares: Sequence[float]) -> list[float] | None:
    """Return for each share the value that this share of all values does not exceed, to a bucket's width.

    shares: ascending, in 0 … 1. None without values. The parts have the same edges.
    """
    merged: Counter[int] = Counter()
    edges: Sequence[float] = ()
    for part in parts:
        merged.update(part.counts)
        edges = part.edges
    total = merged.total()
    if not total:
        return None
    found, results, remaining = 0, [], list(shares)
    for index in sorted(merged):
        found += merged[index]
        while remaining and found >= remaining[0] * total:
            results.append(_middle(edges, index))
            remaining.pop(0)
    return results


def _middle(edges: Sequence[float], index: int) -> float:
    """Return the geometric middle of a bucket; outside the edges, the nearest edge."""
    if index == 0 or index == len(edges):
        return edges[min(index, len(edges) - 1)]
    return (edges[index - 1] * edges[index]) ** 0.5
