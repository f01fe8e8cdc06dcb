"""Many observations in few numbers: how many of them fell into each of some buckets.

Metrics count a process's whole life with it and the dashboard a second's: adding a list costs a tenth of what one
call of `prometheus_client.Histogram.observe` for each value would, and there is a value for every token.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial


def geometric(lowest: float, highest: float, per_decade: int) -> list[float]:
    """Upper edges of buckets from `lowest` on, the last of them at least `highest`."""
    edges = [lowest]
    while edges[-1] < highest:
        edges.append(lowest * 10 ** (len(edges) / per_decade))
    return edges


class Distribution:
    """Counts of values at most each of `edges`, which ascend, and above the last; and the values' sum."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = edges
        self.counts: Counter[int] = Counter()
        self.sum = 0.0

    def add(self, values: Sequence[float]) -> None:
        self.counts.update(map(partial(bisect_left, self.edges), values))
        self.sum += sum(values)

    @property
    def total(self) -> int:
        return self.counts.total()

    def cumulative(self) -> list[int]:
        """How many values were at most each edge, then how many there were."""
        found, counts = 0, []
        for index in range(len(self.edges) + 1):
            found += self.counts[index]
            counts.append(found)
        return counts

    def buckets(self) -> list[tuple[str, float]]:
        """As a Prometheus histogram has them: an upper edge, and how many were at most that."""
        edges = [*map(str, map(float, self.edges)), "+Inf"]
        return list(zip(edges, map(float, self.cumulative()), strict=True))


def percentiles(parts: Iterable[Distribution], shares: Sequence[float]) -> list[float] | None:
    """For each share the value that this share of all observations does not exceed, to a bucket's width.

    None where there are no observations. The parts have the same edges.
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
    """The geometric middle of a bucket of geometric edges; beyond them, the nearest edge."""
    if index == 0 or index == len(edges):
        return edges[min(index, len(edges) - 1)]
    return (edges[index - 1] * edges[index]) ** 0.5
