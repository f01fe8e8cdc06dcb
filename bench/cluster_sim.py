"""Latencies and goodput of a simulated cluster: how many workers to buy, and whether to separate prefill from decode.

    dispec bench cluster-sim --workers 16 --rate 40 --machine h100-qwen2.5-1.5b
    dispec bench cluster-sim --measure machine.json            # this machine and the default model
    dispec bench cluster-sim --validate --num-requests 120 --rate 1.2 --prompt-tokens 200 --output-tokens 80

Scheduler, prefix cache and hand-over are the engine's own; a step costs what a linear fit of measured steps gives. The
table compares colocated workers, which do both, with every split of the same number into prefill and decode workers.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import uvloop

from dispec.bench.cluster import Cluster, Machine, Outcome, StepCost
from dispec.bench.cluster_trace import VOCABULARY, Request, make_trace, read_trace
from dispec.bench.machine import describe_machine
from dispec.bench.mixed_load import running_server
from dispec.bench.openai_load import Client, read
from dispec.bench.report import Output, Plot, Report
from dispec.bench.serve import percentiles, served_model
from dispec.engine.scheduling.step_record import StepRecord

MACHINES = {  # linear fits of measured steps
    "cpu-smollm2": Machine(StepCost(10.2e-3, 0.56e-3, 0.68e-3, 1.7e-6), kv_bytes=23040),
    "h100-qwen2.5-1.5b": Machine(
        StepCost(1.95e-3, 6.6e-6, 12e-6, 0.012e-6), 28672, 65536, 32, 256, 8192, bandwidth=20e9, latency=1e-4
    ),
}
# Number of prompts, and their length, of the steps that are measured.
_SHAPES = ((1, 64), (1, 200), (1, 400), (4, 300), (8, 128), (16, 64), (32, 32), (1, 1500), (6, 1000))


def fit_cost(rows: Sequence[tuple[float, ...]], seconds: list[float]) -> StepCost:
    """Fit the cost of steps by least squares of relative errors. rows: the factors of each term of `StepCost`."""
    weights = 1 / np.array(seconds)
    fitted = np.linalg.lstsq(np.array(rows) * weights[:, None], np.ones(len(seconds)), rcond=None)[0]
    return StepCost(*(max(0.0, float(value)) for value in fitted))


def measure() -> Machine:
    """Return this machine as a worker of the default model."""
    from dispec.engine.api.llm import LLM
    from dispec.engine.sampling_params import SamplingParams  # imports torch

    llm = LLM("smollm2", max_num_seqs=32, max_model_len=4096)
    rng = np.random.default_rng(0)
    prompts = [[rng.integers(0, VOCABULARY, length).tolist() for _ in range(count)] for count, length in _SHAPES]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for salt in ("warm-up", "measured"):
        records: list[StepRecord] = []
        for batch in prompts:
            llm.engine.records.clear()
            for prompt in batch:
                llm.engine.add(prompt, params, cache_salt=salt)
            while llm.engine.has_work:
                llm.engine.step()
            records += llm.engine.records
    rows = []
    for record in records:
        num_decodes = record.num_tokens - record.num_prompt_tokens
        context = record.num_used_blocks * llm.engine.options.block_size if num_decodes else 0
        rows.append((1.0, float(record.num_prompt_tokens), float(num_decodes), float(context)))
    return replace(MACHINES["cpu-smollm2"], cost=fit_cost(rows, [record.seconds for record in records]))


def load_machine(name: str) -> Machine:
    """Return a known machine, or one from a file of `--measure`. Raises ValueError for another name."""
    if name in MACHINES:
        return MACHINES[name]
    try:
        fields = json.loads(Path(name).read_text(encoding="utf-8"))
        return Machine(**fields | {"cost": StepCost(**fields["cost"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"machine is {name!r}, must be {', '.join(MACHINES)} or a file ({error!r})") from error


def summary(outcomes: list[Outcome], ttft: float, itl: float) -> dict[str, Any]:
    """Return percentiles in seconds, and the requests per second that met both objectives."""
    good = [one for one in outcomes if one.ttft <= ttft and (not one.gaps or statistics.fmean(one.gaps) <= itl)]
    span = max(one.times[-1] for one in outcomes) - min(one.request.arrival for one in outcomes)
    return {
        "ttft": percentiles([one.ttft for one in outcomes]),
        "itl": percentiles([gap for one in outcomes for gap in one.gaps]) or percentiles([0.0]),
        "goodput": len(good) / span,
        "kept": len(good) / len(outcomes),
        "cached": sum(one.num_cached_tokens for one in outcomes) / sum(len(one.request.prompt) for one in outcomes),
    }


def splits(workers: int) -> list[tuple[int, int]]:
    """Return numbers of prefill and decode workers, at most twelve pairs after (0, workers), which is colocated."""
    step = max(1, (workers - 1) // 11)
    return [(0, workers), *((number, workers - number) for number in range(1, workers, step))]


async def replay(url: str, trace: list[Request]) -> list[Outcome]:
    """Send the requests to a real server when they are due. Raises RuntimeError if one fails."""
    client, model, start = Client(url), served_model(url, None), time.perf_counter()

    async def send(request: Request) -> Outcome:
        await asyncio.sleep(start + request.arrival - time.perf_counter())
        body = {"model": model, "prompt": request.prompt, "max_tokens": len(request.answer), "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        answer = read(*await client.ask("/v1/completions", json.dumps(body).encode()))
        if answer.error is not None:
            raise RuntimeError(f"a request failed: {answer.error}")
        return Outcome(request._replace(arrival=answer.arrival), answer.chunks)

    found = await asyncio.gather(*map(send, trace))
    client.close()
    return found


def main(
    machine: Annotated[str, typer.Option(help=f"{', '.join(MACHINES)}, or a file from --measure.")] = "cpu-smollm2",
    workers: Annotated[int, typer.Option(min=1, max=1000)] = 8,
    trace: Annotated[str, typer.Option(help="poisson, bursty, multi-turn, or a file of JSON lines.")] = "poisson",
    num_requests: Annotated[int, typer.Option(min=1)] = 1000,
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 4.0,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    output_tokens: Annotated[int, typer.Option(min=1)] = 128,
    slo_ttft: Annotated[float, typer.Option(help="Seconds to the first token.")] = 1.0,
    slo_itl: Annotated[float, typer.Option(help="Mean seconds between tokens.")] = 0.05,
    bandwidth: Annotated[float | None, typer.Option(help="Bytes per second of each worker's link.")] = None,
    seed: int = 0,
    measure_to: Annotated[Path | None, typer.Option("--measure", help="Measure this machine into a file.")] = None,
    validate: Annotated[bool, typer.Option(help="Compare with a server of one engine, started here.")] = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Percentiles and goodput by how a number of workers is split."""
    settings = dict(locals())
    if measure_to is not None:
        measured = measure()
        fields = asdict(measured) | {"cost": measured.cost._asdict()}
        measure_to.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        print(f"{measure_to}: {measured.cost}")
        return
    columns = {"prefill : decode": "", "ttft p50 s": ".3f", "p90": ".3f", "p99": ".3f", "itl p50 ms": ".1f"}
    columns |= {"itl p90 ms": ".1f", "itl p99 ms": ".1f", "goodput req/s": ".2f", "kept": ".0%", "cached": ".0%"}
    report = Report("cluster-sim", settings, describe_machine(), columns, output, plot)
    known = measure() if validate else load_machine(machine)
    if bandwidth is not None:
        known = replace(known, bandwidth=bandwidth)
    if Path(trace).is_file():
        requests = read_trace(Path(trace), seed)
    else:
        requests = make_trace(trace, num_requests, rate, prompt_tokens, output_tokens, seed)

    def add(name: str, outcomes: list[Outcome]) -> float:
        found = summary(outcomes, slo_ttft, slo_itl)
        ttft, itl = ([found[kind][f"p{share}"] for share in (50, 90, 99)] for kind in ("ttft", "itl"))
        cells = [name, *ttft, *(1e3 * seconds for seconds in itl), found["goodput"], found["kept"], found["cached"]]
        report.add({"split": name}, found, cells)
        report.point("goodput", name, found["goodput"])
        return found["goodput"]

    if validate:
        add("one engine, simulated", Cluster(known, 0, 1).run(requests))
        with running_server() as (_, url):
            add("one engine, measured", uvloop.run(replay(url, requests)))
    else:
        best: tuple[float, str] = (-1.0, "")
        for prefill, decode in splits(workers):
            goodput = add(f"{prefill} : {decode}" if prefill else "both", Cluster(known, prefill, decode).run(requests))
            name = f"{prefill} : {decode} of prefill and decode" if prefill else "workers that do both"
            best = max(best, (goodput, name), key=lambda pair: pair[0])
        print(f"buy {best[1]}: {best[0]:.2f} requests per second meet their objectives")
    report.finish(y="requests per second", kind="bars")


if __name__ == "__main__":
    typer.run(main)
