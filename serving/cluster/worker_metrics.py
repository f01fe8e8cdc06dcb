"""Prometheus metrics of each engine behind `dispec serve --disaggregate`, by `role` and `worker`.

Engines have no HTTP address: the server counts their work from their messages. The names differ from those of the
whole server (`metrics`), so a sum over one name counts nothing twice. The series of a removed worker end; those of a
restarted worker continue.
"""

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dispec.serving.cluster.worker import ROLES, Worker, WorkerStatistics
from dispec.serving.cluster.worker_pool import WorkerPool
from dispec.serving.observability.distribution import Distribution
from dispec.serving.observability.metrics import Metrics

_LABELS = ("model_name", "role", "worker")
_GAUGES: tuple[tuple[str, str, Callable[[Worker], float]], ...] = (
    ("up", "1 if this engine takes requests, else 0.", lambda worker: float(worker.is_ready)),
    ("running_requests", "Requests in this engine's batches.", lambda worker: worker.client.num_running),
    ("waiting_requests", "Requests that wait in this engine.", lambda worker: worker.client.num_waiting),
    ("kv_cache_usage", "Share of this engine's KV cache in use.", lambda worker: worker.client.kv_usage),
)
_COUNTERS: tuple[tuple[str, str, Callable[[WorkerStatistics], float]], ...] = (
    ("requests", "Requests that this engine had a part in.", lambda counts: counts.num_requests),
    ("prompt_tokens", "Prompt tokens that this engine computed.", lambda counts: counts.num_prompt_tokens),
    ("generation_tokens", "Tokens that this engine generated.", lambda counts: counts.num_output_tokens),
    ("preemptions", "Sequences that this engine preempted.", lambda counts: counts.num_preemptions),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[WorkerStatistics], Distribution]], ...] = (
    ("ttft_seconds", "From getting a request to this engine's first token of it.", lambda counts: counts.ttft),
    ("itl_seconds", "Between one token of this engine and the next.", lambda counts: counts.itl),
    ("step_seconds", "Time of a step of this engine.", lambda counts: counts.step),
)


class WorkerMetrics(Collector):
    """Reads the current workers of a pool at each scrape."""

    def __init__(self, pool: WorkerPool, metrics: Metrics) -> None:
        """Register with the server's metrics."""
        self._pool = pool
        self._labels = metrics.labels
        metrics.registry.register(self)

    def collect(self) -> Iterable[Metric]:
        model_name = self._labels["model_name"]
        for name, text, count in (
            ("dispec_workers_desired", "Engines of this role that there should be.", self._pool.num_desired),
            ("dispec_workers_actual", "Engines of this role that take requests.", self._pool.num_ready),
        ):
            gauge = GaugeMetricFamily(name, text, labels=(*self._labels, "role"))
            for role in ROLES:
                gauge.add_metric([*self._labels.values(), role], count(role))
            yield gauge
        workers = [(worker, [model_name, worker.role, str(worker.number)]) for worker in self._pool.workers]
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(f"dispec_worker_{name}", text, labels=_LABELS)
            for worker, labels in workers:
                gauge.add_metric(labels, read(worker))
            yield gauge
        for name, text, read_counter in _COUNTERS:
            counter = CounterMetricFamily(f"dispec_worker_{name}", text, labels=_LABELS)
            for worker, labels in workers:
                counter.add_metric(labels, read_counter(worker.statistics))
            yield counter
        for name, text, find in _HISTOGRAMS:
            histogram = HistogramMetricFamily(f"dispec_worker_{name}", text, labels=_LABELS)
            for worker, labels in workers:
                found = find(worker.statistics)
                histogram.add_metric(labels, found.buckets(), found.sum)
            yield histogram
        yield from self._transfers(workers)

    def _transfers(self, workers: list[tuple[Worker, list[str]]]) -> Iterable[Metric]:
        transfers = CounterMetricFamily(
            "dispec_worker_kv_transfers",
            "Prompts by KV transfer: received here, not received, or published for other engines.",
            labels=(*_LABELS, "outcome"),
        )
        num_bytes = CounterMetricFamily(
            "dispec_worker_kv_transfer_bytes",
            "Keys and values that this engine got from others (in) or published for them (out).",
            labels=(*_LABELS, "direction"),
        )
        for worker, labels in workers:
            counts, info = worker.statistics, worker.client.info
            block_bytes = info.transfer_block_bytes if info is not None else 0
            transfers.add_metric([*labels, "arrived"], counts.num_received_prompts)
            transfers.add_metric([*labels, "failed"], counts.num_failed_receives)
            transfers.add_metric([*labels, "offered"], counts.num_sent_prompts)
            num_bytes.add_metric([*labels, "in"], counts.num_received_blocks * block_bytes)
            num_bytes.add_metric([*labels, "out"], counts.num_sent_blocks * block_bytes)
        yield transfers
        yield num_bytes
