import asyncio
import math

import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.process_client import ProcessClient
from dispec.serving.client.request_stream import RequestStream, RequestTiming
from dispec.serving.observability.distribution import Distribution, geometric, percentiles
from dispec.serving.observability.metrics import Metrics
from tests.checkpoints import save_tiny
from tests.engine_clients import ask, ended_request, generate, one_thread_each, running_client, until  # noqa: F401

VLLM = """
num_requests_running num_requests_waiting kv_cache_usage_perc prompt_tokens prompt_tokens_cached generation_tokens
request_success num_preemptions prefix_cache_queries prefix_cache_hits time_to_first_token_seconds
inter_token_latency_seconds e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds
request_decode_time_seconds request_prompt_tokens request_generation_tokens iteration_tokens_total
spec_decode_num_drafts spec_decode_num_draft_tokens spec_decode_num_accepted_tokens
spec_decode_num_accepted_tokens_per_pos
"""
OURS = """
requests tokens_generated ttft_seconds tpot_seconds request_seconds step_seconds batch_tokens running_requests
waiting_requests draft_replicas_desired draft_replicas_actual kv_transfers slo_requests server_info engine_up
engine_restarts requests_refused
"""


def families(metrics: Metrics) -> dict[str, prometheus_client.Metric]:
    return {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}


def samples(metrics: Metrics) -> dict[str, float]:
    """By name; those of one name with other labels (buckets, reasons) summed."""
    found: dict[str, float] = {}
    for family in families(metrics).values():
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def ended(arrival=0.0, started=1.0, first_token=3.0, finished=7.0, **fields) -> RequestStream:
    usual = {
        "num_cached_tokens": 4,
        "num_output_tokens": 3,
        "finish_reasons": ("length",),
        "gaps": [1.5, 2.5],
        "error": None,
    }
    return ended_request(RequestTiming(arrival, started, first_token, finished), **usual | fields)


def step(**fields) -> StepRecord:
    usual = dict.fromkeys(StepRecord._fields, 0) | {"kind": "mixed", "num_accepted_per_position": ()}
    return StepRecord(**usual | fields)


def finish(metrics: Metrics, stream: RequestStream) -> None:
    """Notify the metrics as the client does in a request's life."""
    if stream.timing.first_token is not None:
        metrics.on_first_token(stream)
    metrics.on_request_finished(stream)


@pytest.mark.smoke
def test_the_names_are_all_there_and_no_others() -> None:
    assert sorted(families(Metrics("m"))) == sorted(
        [f"vllm:{name}" for name in VLLM.split()] + [f"dispec_{name}" for name in OURS.split()]
    )


def test_the_server_describes_itself() -> None:
    metrics = Metrics("m", "prefill", "1.2.3")
    (sample,) = families(metrics)["dispec_server_info"].samples
    assert (sample.labels, sample.value) == (metrics.labels | {"role": "prefill", "version": "1.2.3"}, 1)


def test_an_engine_that_is_restarted() -> None:
    metrics = Metrics("m")
    client = ProcessClient({}, max_queued_requests=1, max_queued_tokens=1, stall_seconds=1)  # never started
    metrics.attach(client)
    assert samples(metrics)["dispec_engine_up"] == 0
    client.is_ready = lambda: (True, "ready")  # type: ignore[method-assign]
    assert samples(metrics)["dispec_engine_up"] == 1
    for state in ("ready", "restarting", "ready", "restarting", "dead"):
        metrics.on_state(state)
    assert samples(metrics)["dispec_engine_restarts_total"] == 2


def test_every_sample_says_which_model_and_engine() -> None:
    metrics = Metrics('a "model"')
    finish(metrics, ended())
    metrics.on_drafts(1, 3, [1, 0])
    labels = [sample.labels for family in families(metrics).values() for sample in family.samples]
    assert all((label["model_name"], label["engine"]) == ('a "model"', "0") for label in labels)


moments = st.floats(0, 1e6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.lists(moments, min_size=4, max_size=4), st.sampled_from([2, 3, 4])), max_size=5))
def test_queue_prefill_and_decode_add_up_however_the_request_ended(cases) -> None:
    metrics = Metrics("m")
    for times, known in cases:
        # Sorted, and those that did not come (first token, start) unknown.
        arrival, *middle, finished = sorted(times)
        started = middle[0] if known > 2 else None
        first_token = middle[1] if known > 3 else None
        finish(metrics, ended(arrival, started, first_token, finished))
    found = samples(metrics)
    total = sum(found[f"vllm:request_{phase}_time_seconds_sum"] for phase in ("queue", "prefill", "decode"))
    assert math.isclose(total, found["vllm:e2e_request_latency_seconds_sum"], rel_tol=1e-9, abs_tol=1e-6)
    assert math.isclose(total, found["dispec_request_seconds_sum"], rel_tol=1e-9, abs_tol=1e-6)


@pytest.mark.smoke
def test_what_a_request_leaves_behind() -> None:
    metrics = Metrics("m")
    finish(metrics, ended())
    found = samples(metrics)
    expected = {
        "vllm:request_queue_time_seconds_sum": 1,
        "vllm:request_prefill_time_seconds_sum": 2,
        "vllm:request_decode_time_seconds_sum": 4,
        "vllm:time_to_first_token_seconds_sum": 3,
        "dispec_ttft_seconds_sum": 3,
        "vllm:inter_token_latency_seconds_sum": 4,
        "vllm:inter_token_latency_seconds_count": 2,
        "dispec_tpot_seconds_sum": 2,
        "vllm:prompt_tokens_total": 10,
        "vllm:prompt_tokens_cached_total": 4,
        "vllm:prefix_cache_queries_total": 10,
        "vllm:prefix_cache_hits_total": 4,
        "vllm:generation_tokens_total": 3,
        "dispec_tokens_generated_total": 3,
        "vllm:request_prompt_tokens_sum": 10,
        "vllm:request_generation_tokens_sum": 3,
        "dispec_requests_total": 1,
        "vllm:request_success_total": 1,
    }
    assert {name: found[name] for name in expected} == expected


def test_a_request_that_never_started_counts_as_an_end_and_as_nothing_else() -> None:
    metrics = Metrics("m")
    before = samples(metrics)
    failed = {"finish_reasons": ("error",), "num_output_tokens": 0, "gaps": [], "error": "refused"}
    finish(metrics, ended(started=None, first_token=None, **failed))
    after = samples(metrics)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"dispec_requests_total", "vllm:request_success_total"}


@pytest.mark.smoke
def test_ends_are_counted_by_choice_and_reason() -> None:
    metrics = Metrics("m")
    finish(metrics, ended(finish_reasons=("stop", "stop", "length")))
    ends = {
        sample.labels["finished_reason"]: sample.value
        for sample in families(metrics)["vllm:request_success"].samples
        if sample.name.endswith("_total")
    }
    assert ends == {"stop": 2, "length": 1, "abort": 0, "error": 0}


@pytest.mark.smoke
def test_what_a_step_leaves_behind() -> None:
    metrics = Metrics("m")
    metrics.on_step(step(num_tokens=33, num_preempted=2, schedule=0.5, launch=1, wait=2, commit=4), 8.0)
    found = samples(metrics)
    expected = {
        "vllm:iteration_tokens_total_sum": 33,
        "dispec_batch_tokens_sum": 33,
        "vllm:num_preemptions_total": 2,
        "dispec_step_seconds_sum": 7.5,
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.smoke
def test_drafts_are_counted_by_position() -> None:
    metrics = Metrics("m")
    metrics.on_drafts(num_drafts=2, num_draft_tokens=6, accepted_per_position=[2, 1, 0])
    metrics.on_drafts(num_drafts=1, num_draft_tokens=3, accepted_per_position=[1, 0, 0])
    metrics.on_step(
        step(kind="decode", num_tokens=7, num_drafts=1, num_draft_tokens=3, num_planned_draft_tokens=4), 8.0
    )
    found = samples(metrics)
    assert found["vllm:spec_decode_num_drafts_total"] == 4
    assert found["vllm:spec_decode_num_draft_tokens_total"] == 12
    assert found["vllm:spec_decode_num_accepted_tokens_total"] == 4
    assert found["dispec_draft_replicas_desired"] == 4
    assert found["dispec_draft_replicas_actual"] == 3
    by_position = {
        sample.labels["position"]: sample.value
        for sample in families(metrics)["vllm:spec_decode_num_accepted_tokens_per_pos"].samples
    }
    assert by_position == {"0": 3, "1": 1, "2": 0}


# On edges and beyond them, where an error would be one bucket.
@settings(deadline=None)
@given(st.lists(st.one_of(st.floats(0, 5), st.sampled_from([0.001, 0.01, 2.0, 0.0])), max_size=60))
def test_a_batched_histogram_says_what_one_that_takes_each_value_says(gaps) -> None:
    metrics = Metrics("m")
    for part in (gaps[:20], gaps[20:]):
        finish(metrics, ended(gaps=part))
    family = families(metrics)["vllm:inter_token_latency_seconds"]
    edges = [float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels]
    registry = prometheus_client.CollectorRegistry()
    histogram = prometheus_client.Histogram("one_by_one", "", buckets=edges, registry=registry)
    for gap in gaps:
        histogram.observe(gap)
    expected = [
        (sample.labels.get("le"), pytest.approx(sample.value))
        for sample in next(iter(registry.collect())).samples
        if not sample.name.endswith("_created")
    ]
    assert [(sample.labels.get("le"), sample.value) for sample in family.samples] == expected


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 50), min_size=1, max_size=50), st.integers(0, 50))
def test_percentiles_are_right_to_a_bucket(values, cut) -> None:
    edges = geometric(1e-3, 100, per_decade=40)
    parts = [Distribution(edges), Distribution(edges)]
    for part, some in zip(parts, (values[:cut], values[cut:]), strict=True):
        part.add(some)
    found = percentiles(parts, (0.5, 0.95))
    assert found is not None
    width = 10 ** (1 / 40)
    for share, value in zip((0.5, 0.95), found, strict=True):
        exact = sorted(values)[math.ceil(share * len(values)) - 1]
        assert exact / width <= value <= exact * width * (1 + 1e-9)
    assert percentiles([Distribution(edges)], (0.5,)) is None


def test_with_a_real_engine_the_numbers_are_those_of_the_answers(tmp_path) -> None:
    save_tiny(tmp_path, "llama")

    async def run() -> None:
        metrics = Metrics("tiny")
        params = SamplingParams(n=2, temperature=1, max_tokens=9, ignore_eos=True, seed=1)
        async with running_client(tmp_path) as client:
            metrics.attach(client)
            prompt = list(range(40))
            await generate(client, prompt, params)
            await generate(client, prompt, params)
            endless = ask(client, prompt, SamplingParams(max_tokens=400, ignore_eos=True))
            await until(lambda: endless.timing.first_token is not None)
            busy = samples(metrics)
            endless.abort()
            idle = samples(metrics)
        assert busy["vllm:num_requests_running"] == busy["dispec_running_requests"] == 1
        assert busy["vllm:num_requests_waiting"] == busy["dispec_waiting_requests"] == 0
        assert busy["vllm:generation_tokens_total"] == 2 * 2 * 9
        assert busy["vllm:prompt_tokens_total"] == busy["vllm:prefix_cache_queries_total"] == 3 * 40
        assert busy["vllm:prompt_tokens_cached_total"] == busy["vllm:prefix_cache_hits_total"] == 2 * 32
        assert busy["vllm:inter_token_latency_seconds_count"] == 2 * 2 * 8
        assert busy["vllm:time_to_first_token_seconds_count"] == 3
        assert idle["vllm:num_requests_running"] == idle["vllm:kv_cache_usage_perc"] == 0
        assert idle["dispec_requests_total"] == 3

    asyncio.run(run())


def test_the_share_of_the_cache_in_use_is_the_last_steps(tmp_path) -> None:
    save_tiny(tmp_path, "llama")

    async def run() -> None:
        metrics = Metrics("tiny")
        async with running_client(tmp_path) as client:
            metrics.attach(client)
            stream = ask(client, list(range(64)), SamplingParams(max_tokens=300, ignore_eos=True))
            await until(lambda: stream.timing.first_token is not None)
            # 64 tokens and a few more are 5 blocks of 16 or more
            assert samples(metrics)["vllm:kv_cache_usage_perc"] >= 4 / client.info.num_blocks
            stream.abort()

    asyncio.run(run())
