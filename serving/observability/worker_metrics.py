"""What Prometheus scrapes of each engine behind `dispec serve --disaggregate`, by `role` and `worker`.

Engines have no address of their own to be scraped at: what they do the front hears, step by step. The names are not
those of the whole server (`metrics`), so that a sum over one name never counts anything twice. A worker that
is gone takes its series with it; one that has been started again goes on with its own.
"""

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dispec.serving.cluster.worker import Worker
from dispec.serving.cluster.worker_pool import WorkerPool
from dispec.serving.observability.distribution import Distribution

_LABELS = ("model_name", "role", "worker")
_GAUGES: tuple[tuple[str, str, Callable[[Worker], float]], ...] = (
    ("up", "1 if this engine takes requests, else 0.", lambda worker: float(worker.is_ready)),
    ("running_requests", "Requests in this engine's batches.", lambda worker: worker.client.num_running),
    ("waiting_requests", "Requests that wait in this engine.", lambda worker: worker.client.num_waiting),
    ("kv_cache_usage", "Share of this engine's KV cache in use.", lambda worker: worker.kv_usage),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Worker], float]], ...] = (
    ("requests", "Requests that this engine had a part in.", lambda worker: worker.tally.num_requests),
    ("prompt_tokens", "Prompt tokens that this engine computed.", lambda worker: worker.tally.num_prompt_tokens),
    ("generation_tokens", "Tokens that this engine generated.", lambda worker: worker.tally.num_output_tokens),
    ("preemptions", "Sequences that gave their memory up here.", lambda worker: worker.tally.num_preemptions),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[Worker], Distribution]], ...] = (
    ("ttft_seconds", "From getting a request to this engine's first token of it.", lambda worker: worker.tally.ttft),
    ("itl_seconds", "Between one token of this engine and the next.", lambda worker: worker.tally.itl),
    ("step_seconds", "Time of a step of this engine.", lambda worker: worker.tally.step),
)


class WorkerMetrics(Collector):
    """Reads the workers that there are whenever somebody scrapes."""

    def __init__(self, pool: WorkerPool, model_name: str) -> None:
        self._pool = pool
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        workers = [(worker, [self._model_name, worker.role, str(worker.number)]) for worker in self._pool.workers]
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(f"dispec_worker_{name}", text, labels=_LABELS)
            for worker, labels in workers:
                gauge.add_metric(labels, read(worker))
            yield gauge
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(f"dispec_worker_{name}", text, labels=_LABELS)
            for worker, labels in workers:
                counter.add_metric(labels, read(worker))
            yield counter
        for name, text, find in _HISTOGRAMS:
            histogram = HistogramMetricFamily(f"dispec_worker_{name}", text, labels=_LABELS)
            for worker, labels in workers:
                found = find(worker)
                histogram.add_metric(labels, found.buckets(), found.sum)
            yield histogram
        yield from self._transfers(workers)

    def _transfers(self, workers: list[tuple[Worker, list[str]]]) -> Iterable[Metric]:
        transfers = CounterMetricFamily(
            "dispec_worker_kv_transfers",
            "Prompts whose keys and values this engine got, failed to get, or published for others.",
            labels=(*_LABELS, "outcome"),
        )
        num_bytes = CounterMetricFamily(
            "dispec_worker_kv_transfer_bytes",
            "Keys and values that this engine got from others (in) or published for them (out).",
            labels=(*_LABELS, "direction"),
        )
        for worker, labels in workers:
            tally, info = worker.tally, worker.client.info
            block_bytes = info.transfer_block_bytes if info is not None else 0
            for outcome, count in (
                ("arrived", tally.num_received_prompts),
                ("failed", tally.num_failed),
                ("offered", tally.num_sent_prompts),
            ):
                transfers.add_metric([*labels, outcome], count)
            num_bytes.add_metric([*labels, "in"], tally.num_received_blocks * block_bytes)
            num_bytes.add_metric([*labels, "out"], tally.num_sent_blocks * block_bytes)
        yield transfers
        yield num_bytes
