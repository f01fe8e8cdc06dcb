"""Prometheus metrics of the server: vLLM's names, which dashboards, routers and autoscalers know, and a few more.

Only the server process exports. It learns of the engine process from messages, so no two processes write one counter.
"""

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.engine_client import EngineClient, EngineObserver, State
from dispec.serving.client.request_stream import RequestStream
from dispec.serving.client.slo import Slo
from dispec.serving.observability.distribution import (
    BETWEEN_TOKENS,
    FIRST_TOKEN,
    REQUEST,
    STEP,
    TOKENS,
    Distribution,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

disable_created_metrics()  # one more gauge beside every counter and histogram, with its creation time


class Metrics(EngineObserver):
    """The metrics of one server. A request is counted when it ends, except for its prompt and first token."""

    def __init__(self, model_name: str, role: str = "both", version: str = "") -> None:
        self.registry = CollectorRegistry()
        self.labels = {"model_name": model_name, "engine": "0"}
        self._make_vllm_counters()
        self._make_vllm_histograms()
        self._make_own_metrics()
        self._gauge("dispec_server_info", "1; the labels describe the server.", role=role, version=version).set(1)

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def attach(self, client: EngineClient) -> None:
        """Count the events of a client, and read its gauges at each scrape."""
        if self not in client.observers:
            client.observers.append(self)
        for gauge in (self._vllm_running, self._running):
            gauge.set_function(lambda: client.num_running)
        for gauge in (self._vllm_waiting, self._waiting):
            gauge.set_function(lambda: client.num_waiting)
        self._vllm_kv_usage.set_function(lambda: client.kv_usage)
        self._engine_up.set_function(lambda: client.is_ready()[0])

    def on_step(self, record: StepRecord, finished: float) -> None:
        self._preemptions.inc(record.num_preempted)
        self._iteration_tokens.observe(record.num_tokens)
        self._batch_tokens.observe(record.num_tokens)
        self._step_seconds.observe(record.seconds)
        self._arrived.inc(record.num_received_prompts)
        self._failed_arrivals.inc(record.num_failed_receives)
        if record.num_drafts:
            self.on_drafts(record.num_drafts, record.num_draft_tokens, record.num_accepted_per_position)
        if record.kind == "decode":
            self._draft_replicas_desired.set(record.num_planned_draft_tokens)
            self._draft_replicas_actual.set(record.num_draft_tokens)

    def on_first_token(self, stream: RequestStream) -> None:
        for counter in (self._prompt_tokens, self._prefix_queries):
            counter.inc(stream.num_prompt_tokens)
        for counter in (self._prompt_tokens_cached, self._prefix_hits):
            counter.inc(stream.num_cached_tokens)
        for histogram in (self._first_token, self._ttft):
            histogram.observe(stream.timing.ttft)

    def on_request_finished(self, stream: RequestStream) -> None:
        self._requests.inc()
        for reason in stream.finish_reasons:
            self._success.labels(**self.labels, finished_reason=reason).inc()
        timing = stream.timing
        if not stream.has_started:
            return  # rejected, or aborted in the queue: it says nothing about the speed of requests
        for counter in (self._generation_tokens, self._tokens_generated):
            counter.inc(stream.num_output_tokens)
        self._request_generation_tokens.observe(stream.num_output_tokens)
        self._request_prompt_tokens.observe(stream.num_prompt_tokens)
        slo, met_slo = stream.request.slo, stream.met_slo
        if slo is not None and met_slo is not None:
            self._count_slo(slo, "met" if met_slo else "missed")
        for phase, histogram in self._phases.items():
            histogram.observe(getattr(timing, phase))
        for histogram in (self._e2e, self._request_seconds):
            histogram.observe(timing.total)
        self._gaps.distribution.add(stream.gaps)
        if stream.gaps:
            self._tpot.observe(sum(stream.gaps) / len(stream.gaps))

    def on_state(self, state: State) -> None:
        if state == "restarting":
            self._engine_restarts.inc()

    def on_refused(self) -> None:
        self._refused.inc()

    def on_shed(self, slo: Slo) -> None:
        self._count_slo(slo, "shed")

    def on_drafts(self, num_drafts: int, num_draft_tokens: int, accepted_per_position: Sequence[int]) -> None:
        """Count the drafts that a step verified, and the accepted tokens at each position of a draft."""
        self._drafts.inc(num_drafts)
        self._draft_tokens.inc(num_draft_tokens)
        self._accepted_tokens.inc(sum(accepted_per_position))
        for position, accepted in enumerate(accepted_per_position):
            self._accepted_per_position.labels(**self.labels, position=str(position)).inc(accepted)

    def _count_slo(self, slo: Slo, outcome: str) -> None:
        self._slo_requests.labels(**self.labels, slo=slo.name, outcome=outcome).inc()

    def _make_vllm_counters(self) -> None:
        counter, gauge = self._counter, self._gauge
        self._vllm_running = gauge("vllm:num_requests_running", "Requests in the engine's batches.")
        self._vllm_waiting = gauge("vllm:num_requests_waiting", "Requests that wait to be scheduled.")
        self._vllm_kv_usage = gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 1 being all of it.")
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens, cached ones included.")
        self._prompt_tokens_cached = counter("vllm:prompt_tokens_cached", "Prompt tokens that were in the cache.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self._preemptions = counter("vllm:num_preemptions", "Sequences that were preempted.")
        self._prefix_queries = counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._prefix_hits = counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.")
        self._success = self._family("vllm:request_success", "Choices by how they ended.", "finished_reason")
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(**self.labels, finished_reason=reason)
        self._drafts = counter("vllm:spec_decode_num_drafts", "Drafts that were verified.")
        self._draft_tokens = counter("vllm:spec_decode_num_draft_tokens", "Tokens of those drafts.")
        self._accepted_tokens = counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens that were accepted.")
        self._accepted_per_position = self._family(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by their position in the draft.",
            "position",
        )

    def _make_vllm_histograms(self) -> None:
        histogram = self._histogram
        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN
        )
        self._gaps = _BatchedHistogram(
            "vllm:inter_token_latency_seconds", "Between one token and the next.", self.labels, BETWEEN_TOKENS
        )
        self.registry.register(self._gaps)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to its end.", REQUEST)
        self._phases = {
            phase: histogram(f"vllm:request_{phase}_time_seconds", text, REQUEST)
            for phase, text in (
                ("queue", "From a request's arrival until it was first scheduled."),
                ("prefill", "From first being scheduled to the first token."),
                ("decode", "From the first token to the end."),
            )
        }
        self._request_prompt_tokens = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._request_generation_tokens = histogram("vllm:request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._iteration_tokens = histogram("vllm:iteration_tokens_total", "Tokens computed in a step.", TOKENS)

    def _make_own_metrics(self) -> None:
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self._engine_up = gauge("dispec_engine_up", "1 if requests are accepted and make progress, else 0.")
        self._engine_restarts = counter("dispec_engine_restarts", "Engines that died and are restarted.")
        self._requests = counter("dispec_requests", "Requests that ended, in any way.")
        self._refused = counter("dispec_requests_refused", "Requests refused with 503 before they were queued.")
        self._tokens_generated = counter("dispec_tokens_generated", "Tokens generated.")
        self._ttft = histogram("dispec_ttft_seconds", "From a request's arrival to its first token.", FIRST_TOKEN)
        self._tpot = histogram("dispec_tpot_seconds", "Time per token after the first, by request.", BETWEEN_TOKENS)
        self._request_seconds = histogram("dispec_request_seconds", "From a request's arrival to its end.", REQUEST)
        self._step_seconds = histogram("dispec_step_seconds", "Time of a step.", STEP)
        self._batch_tokens = histogram("dispec_batch_tokens", "Tokens computed in a step.", TOKENS)
        self._running = gauge("dispec_running_requests", "Requests in the engine's batches.")
        self._waiting = gauge("dispec_waiting_requests", "Requests that wait to be scheduled.")
        self._slo_requests = self._family(
            "dispec_slo_requests",
            "Requests of each class that met their objectives (the goodput), missed them, and were rejected.",
            "slo",
            "outcome",
        )
        transfers = self._family(
            "dispec_kv_transfers",
            "Prompts by KV transfer: received from another engine, or computed here because it failed.",
            "outcome",
        )
        self._arrived = transfers.labels(**self.labels, outcome="arrived")
        self._failed_arrivals = transfers.labels(**self.labels, outcome="failed")
        self._draft_replicas_desired = gauge(
            "dispec_draft_replicas_desired", "Draft tokens that the controller last planned for a step."
        )
        self._draft_replicas_actual = gauge(
            "dispec_draft_replicas_actual", "Draft tokens that the last decode step verified."
        )

    def _family(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, (*self.labels, *labels), registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return self._family(name, text).labels(**self.labels)

    def _gauge(self, name: str, text: str, **more_labels: str) -> Gauge:
        labels = self.labels | more_labels
        return Gauge(name, text, tuple(labels), registry=self.registry).labels(**labels)

    def _histogram(self, name: str, text: str, edges: Sequence[float]) -> Histogram:
        histogram = Histogram(name, text, tuple(self.labels), buckets=edges, registry=self.registry)
        return histogram.labels(**self.labels)


class _BatchedHistogram(Collector):
    """A histogram that takes lists of values."""

    def __init__(self, name: str, text: str, labels: Mapping[str, str], edges: Sequence[float]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self.distribution = Distribution(edges)

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), self.distribution.buckets(), self.distribution.sum)
        yield family
