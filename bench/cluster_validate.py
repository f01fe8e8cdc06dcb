"""The simulated cluster against real servers on this machine: what it predicts of a trace, and what comes of it.

Everything that the simulation is told is measured beforehand, on other requests: steps by themselves and beside a
second worker (`bench.cluster_measure`), the link by `bench.disagg`, and what front and client compute for a request and
for a token by their processor time.
"""

import asyncio
import json
import os
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from typing import Any

import psutil
import uvloop

from dispec.bench import cluster_measure
from dispec.bench.cluster import Cluster, Host, Machine, Outcome
from dispec.bench.cluster_trace import Request
from dispec.bench.disagg import measure as measure_link
from dispec.bench.geometries import model_config
from dispec.bench.machine import describe_machine
from dispec.bench.mixed_load import running_server
from dispec.bench.openai_load import Client, read
from dispec.bench.report import Report
from dispec.bench.serve import PERCENTILES, percentiles, served_model

COLUMNS = {"": "", " ": "", "ttft p50 ms": ".0f", "p90": ".0f", "p99": ".0f", "itl p50 ms": ".1f", "itl p90": ".1f"}
COLUMNS |= {"itl p99": ".1f", "slow gaps": ".2%"}
_PREFILL, _DECODE = 1, 1


@dataclass(frozen=True)
class Kind:
    """A server to compare with."""

    name: str
    split: tuple[int, int]
    options: tuple[str, ...]


KINDS = (
    Kind("colocated", (0, 1), ()),
    Kind(
        f"{_PREFILL} : {_DECODE}",
        (_PREFILL, _DECODE),
        ("--disaggregate", "--num-prefill-workers", str(_PREFILL), "--num-decode-workers", str(_DECODE)),
    ),
)


async def replay(url: str, model: str, trace: list[Request], *, one_by_one: bool = False) -> list[Outcome]:
    """The same requests on a real server, when they are due, or each after the one before it. Raises RuntimeError if
    one fails."""
    client = Client(url)
    start = time.perf_counter()
    turns = asyncio.Semaphore(1 if one_by_one else len(trace))

    async def one(request: Request) -> Outcome:
        if not one_by_one:
            await asyncio.sleep(start + request.arrival - time.perf_counter())
        async with turns:
            return await ask(request)

    async def ask(request: Request) -> Outcome:
        body = {"model": model, "prompt": request.prompt, "max_tokens": len(request.answer), "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        answer = read(*await client.ask("/v1/completions", json.dumps(body).encode()))
        if answer.error is not None:
            raise RuntimeError(f"a request failed: {answer.error}")
        return Outcome(request._replace(arrival=answer.arrival), answer.chunks)

    found = await asyncio.gather(*map(one, trace))
    client.close()
    return list(found)


def front_cost(url: str, model: str, front: "subprocess.Popen[str]", trace: list[Request]) -> tuple[float, float]:
    """Seconds that front and client compute for a token and for a request: of requests for one token, and then of
    whole ones, one after another."""
    processes = psutil.Process(front.pid), psutil.Process()

    def used(some: list[Request]) -> float:
        before = sum(sum(process.cpu_times()[:2]) for process in processes)
        uvloop.run(replay(url, model, some, one_by_one=True))
        return sum(sum(process.cpu_times()[:2]) for process in processes) - before

    used(trace[:1])  # what is done once only
    short = [request._replace(answer=request.answer[:1]) for request in trace]
    of_request = used(short) / len(short)
    tokens = sum(len(request.answer) for request in trace)
    return max(0.0, used(trace) - of_request * len(trace)) / tokens, of_request


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Percentiles in seconds, and the share of gaps above three times the median: those with a prompt's step in them.
    A percentile near that share says which side of a cliff it fell on, and little else."""
    gaps = [gap for one in outcomes for gap in one.gaps]
    middle = statistics.median(gaps)
    return {
        "ttft": percentiles([one.ttft for one in outcomes]),
        "itl": percentiles(gaps),
        "slow_gaps": sum(gap > 3 * middle for gap in gaps) / len(gaps),
        "tokens": sum(len(one.times) for one in outcomes),
    }


def validate(
    machine: Machine, trace: list[Request], calibration: list[Request], settings: dict[str, Any], output: Any, plot: Any
) -> None:
    """Put a trace on both kinds of server and on their simulations, and print how far these were off."""
    num_cores = len(os.sched_getaffinity(0))
    report = Report("cluster-validate", settings, describe_machine(), COLUMNS, output, plot)
    for kind in KINDS:
        count = max(1, sum(kind.split))
        threads = max(1, num_cores // count)
        print(f"{kind.name}: measuring steps with {threads} threads", flush=True)
        (alone,) = cluster_measure.steps(threads)
        known = replace(machine, cost=alone.cost(), spread=alone.spread())
        contention = 1.0
        if count > 1:
            contention = cluster_measure.slowdown(alone, cluster_measure.steps(threads, count))
            bandwidth, latency = link_rate(known)
            known = replace(known, bandwidth=bandwidth, latency=latency)
        with running_server(*kind.options) as (process, url):
            model = served_model(url, None)
            token, request = front_cost(url, model, process, calibration)
            real = summary(uvloop.run(replay(url, model, trace)))
        host = Host(num_cores, threads, contention, token, request)
        print(f"  {known.cost}\n  {host}, a link of {known.bandwidth / 1e9:.1f} GB/s")
        shares = ", ".join(f"p{share} {known.spread[share]:.2f}" for share in PERCENTILES)
        print(f"  decode steps of one shape, in medians of it: {shares}")
        wanted = sum(len(one.answer) for one in trace)
        if real["tokens"] != wanted:
            print(f"  {real['tokens']} pieces of text for {wanted} tokens: some gaps are of two tokens")
        predicted = summary(Cluster(known, *kind.split, host).run(trace))
        _add(report, kind.name, "predicted", predicted)
        _add(report, kind.name, "measured", real)
        for name in ("ttft", "itl"):
            errors = {share: predicted[name][f"p{share}"] / real[name][f"p{share}"] - 1 for share in PERCENTILES}
            said = ", ".join(f"p{share} {error:+.0%}" for share, error in errors.items())
            print(f"  predicted against measured, {name}: {said}", flush=True)
            for share, error in errors.items():
                report.point(f"{name} {kind.name}", f"p{share}", 100 * error)
    report.finish(y="error in %", kind="bars")


def link_rate(machine: Machine) -> tuple[float, float]:
    """Bytes per second and seconds before the first, of pages of another geometry: bytes are bytes."""
    tokens = [64, 1024]
    found = measure_link("cpu", "shm", "qwen2.5-0.5b", machine.block_size, tokens, 5)
    small, large = (statistics.median(found[count]["pull"]) for count in tokens)
    config = model_config("qwen2.5-0.5b")
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    seconds = max(1e-9, (large - small) / (tokens[1] - tokens[0]) / token_bytes)
    return 1 / seconds, max(0.0, small - tokens[0] * token_bytes * seconds)


def _add(report: Report, kind: str, what: str, found: dict[str, Any]) -> None:
    cells = [1e3 * found[name][f"p{share}"] for name in ("ttft", "itl") for share in PERCENTILES]
    report.add({"servers": kind, "what": what}, found, [kind, what, *cells, found["slow_gaps"]])
