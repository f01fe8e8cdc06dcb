"""What /metrics of `dispec serve --disaggregate` says of each engine behind it."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dispec.serving.cluster.worker_metrics import WorkerMetrics
from dispec.serving.observability.metrics import Metrics
from tests.checkpoints import save_tiny
from tests.engine_clients import directory as directory
from tests.engine_clients import generate, until
from tests.engine_clients import one_thread_each as one_thread_each
from tests.servers import Server, server, wait_for
from tests.small_engine import greedy
from tests.test_worker_pool import running_pool

PROMPT = list(range(3, 43))  # 40 tokens: three blocks of 16
BLOCK_BYTES = 2 * 3 * 2 * 32 * 16 * 4  # keys and values of 3 layers, 2 heads of 32 numbers, 16 tokens, in fp32
OUTPUT = 10

Series = dict[tuple[str, str, str], float]


def series(text: str) -> Series:
    """Values of the workers by name, role and worker; an `outcome` or a `direction` is part of the name."""
    found: Series = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("dispec_worker_"):
            assert family.documentation
            for sample in family.samples:
                kind = sample.labels.get("outcome") or sample.labels.get("direction") or sample.labels.get("le")
                name = sample.name.removeprefix("dispec_worker_") + (f" {kind}" if kind else "")
                key = (name, sample.labels["role"], sample.labels["worker"])
                assert key not in found
                assert sample.labels["model_name"]
                found[key] = sample.value
    return found


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("apart")
    save_tiny(directory / "tiny", "qwen3")
    with server(directory, directory / "tiny", disaggregate=True, prefill=1, decode=1) as running_server:
        yield running_server


def of(server: Server) -> Series:
    return series(server.get("/metrics").text)


def ask(server: Server, prompt: list[int]) -> None:
    body = {"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == OUTPUT


@pytest.mark.slow
def test_each_engine_tells_what_it_did(apart: Server) -> None:
    for number in range(3):
        ask(apart, [token + 50 * number for token in PROMPT])
    wait_for(apart.is_idle)
    found = of(apart)
    prefill = {name: value for (name, role, worker), value in found.items() if (role, worker) == ("prefill", "0")}
    decode = {name: value for (name, role, worker), value in found.items() if (role, worker) == ("decode", "1")}
    assert len(prefill) + len(decode) == len(found)
    assert prefill.keys() == decode.keys()
    for worker in (prefill, decode):
        assert (worker["up"], worker["running_requests"], worker["waiting_requests"]) == (1, 0, 0)
        assert worker["kv_cache_usage"] == 0
        assert worker["requests_total"] == 3
        assert worker["kv_transfers_total failed"] == 0
        assert worker["ttft_seconds_count"] == worker["ttft_seconds_bucket +Inf"] == 3
        assert worker["step_seconds_count"] > 0
    assert (prefill["prompt_tokens_total"], decode["prompt_tokens_total"]) == (3 * len(PROMPT), 0)
    assert (prefill["generation_tokens_total"], decode["generation_tokens_total"]) == (3, 3 * (OUTPUT - 1))
    assert (prefill["kv_transfers_total offered"], decode["kv_transfers_total offered"]) == (3, 0)
    assert (prefill["kv_transfers_total arrived"], decode["kv_transfers_total arrived"]) == (0, 3)
    assert (prefill["kv_transfer_bytes_total out"], prefill["kv_transfer_bytes_total in"]) == (9 * BLOCK_BYTES, 0)
    assert (decode["kv_transfer_bytes_total in"], decode["kv_transfer_bytes_total out"]) == (9 * BLOCK_BYTES, 0)
    assert (prefill["itl_seconds_count"], decode["itl_seconds_count"]) == (0, 3 * (OUTPUT - 1))
    # A prompt that is known is neither computed nor sent again, but for what is not a whole block.
    ask(apart, PROMPT)
    wait_for(apart.is_idle)
    later = of(apart)
    computed = later["prompt_tokens_total", "prefill", "0"] - prefill["prompt_tokens_total"]
    moved = later["kv_transfer_bytes_total in", "decode", "1"] - decode["kv_transfer_bytes_total in"]
    assert (computed, moved) == (len(PROMPT) % 16, BLOCK_BYTES)


@pytest.mark.slow
def test_the_whole_servers_numbers_are_not_the_workers_twice(apart: Server) -> None:
    ask(apart, PROMPT)
    wait_for(apart.is_idle)
    text = apart.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (generated,) = (s.value for s in families["vllm:generation_tokens"].samples if s.name.endswith("_total"))
    of_workers = [s.value for s in families["dispec_worker_generation_tokens"].samples]
    assert generated == sum(of_workers)
    assert not any("worker" in s.labels for s in families["vllm:generation_tokens"].samples)


def test_the_dashboard_has_a_row_for_each_engine_and_the_worker_of_a_request(apart: Server) -> None:
    ask(apart, PROMPT)
    with apart.http.stream("GET", "/dashboard/events") as stream:
        event = json.loads(next(stream.iter_lines()).removeprefix("data: "))
    names = [(row["name"], row["role"], row["state"]) for row in event["engines"]]
    assert names == [("server", None, None), ("prefill 0", "prefill", "ready"), ("decode 1", "decode", "ready")]
    row = event["ended"][-1]
    assert (row["worker"], row["state"], row["prompt"], row["output"]) == ("decode 1", "finished", len(PROMPT), OUTPUT)
    assert row["prefill"] > 0


def test_a_worker_that_is_down_says_so_and_one_that_is_gone_says_nothing(directory: Path) -> None:
    async def come_and_go() -> None:
        async with running_pool(directory) as pool:
            metrics = Metrics("tiny")
            metrics.attach(pool)
            WorkerMetrics(pool, metrics)

            def now(name: str) -> dict[str, float]:
                found = series(metrics.render().decode())
                return {worker: value for (known, _, worker), value in found.items() if known == name}

            await generate(pool, PROMPT, greedy(OUTPUT))
            assert now("up") == {"0": 1, "1": 1}
            decode = pool.workers[1]
            assert decode.client.info is not None
            os.kill(decode.client.info.pid, signal.SIGKILL)
            await until(lambda: now("up") == {"0": 1, "1": 0})
            await until(lambda: now("up") == {"0": 1, "1": 1})
            assert now("generation_tokens_total") == {"0": 1, "1": OUTPUT - 1}
            another = pool.add_worker("decode")
            assert now("up") == {"0": 1, "1": 1, "2": 0}
            await another.client.start()
            assert now("up") == {"0": 1, "1": 1, "2": 1}
            await pool.remove_worker(another)
            assert now("up") == {"0": 1, "1": 1}

    with asyncio.Runner() as runner:
        runner.run(come_and_go())
