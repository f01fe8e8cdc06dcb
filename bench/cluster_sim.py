"""Latencies of a cluster that need not be there: what to buy, and whether to compute prompts apart.

    dispec bench cluster-sim --workers 16 --rate 40 --machine h100-qwen2.5-1.5b
    dispec bench cluster-sim --measure machine.json            # this machine and the default model
    dispec bench cluster-sim --validate --num-requests 120 --rate 1.2 --prompt-tokens 200 --output-tokens 80

The scheduler, the prefix cache and the rules of handing over are the project's own; a step takes what a straight line
through measured steps says. Colocated workers, which do both, stand beside every way to split the same number of them.
"""

import json
import os
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dispec.bench import cluster_measure
from dispec.bench.cluster import Cluster, Machine, Outcome, StepCost
from dispec.bench.cluster_trace import make_trace, read_trace
from dispec.bench.cluster_validate import validate
from dispec.bench.machine import describe_machine
from dispec.bench.report import Output, Plot, Report
from dispec.bench.serve import percentiles

CALIBRATION = 12  # requests by which --validate finds what front and client compute
# Straight lines through the figures of BENCHMARKS.md.
MACHINES = {
    "cpu-smollm2": Machine(StepCost(10.2e-3, 0.56e-3, 0.68e-3, 1.7e-6), kv_bytes=23040),
    "h100-qwen2.5-1.5b": Machine(
        StepCost(1.95e-3, 6.6e-6, 12e-6, 0.012e-6), 28672, 65536, 32, 256, 8192, bandwidth=20e9, latency=1e-4
    ),
}


def measure(path: Path) -> Machine:
    """A worker of this machine with all its cores, and the default model."""
    (found,) = cluster_measure.steps(len(os.sched_getaffinity(0)))
    machine = replace(MACHINES["cpu-smollm2"], cost=found.cost(), spread=found.spread())
    path.write_text(json.dumps(asdict(machine) | {"cost": machine.cost._asdict()}, indent=2) + "\n", encoding="utf-8")
    return machine


def load_machine(name: str) -> Machine:
    """One that is known, or from a file that `measure` wrote. Raises ValueError for anything else."""
    if name in MACHINES:
        return MACHINES[name]
    try:
        stated = json.loads(Path(name).read_text(encoding="utf-8"))
        return Machine(**stated | {"cost": StepCost(**stated["cost"]), "spread": tuple(stated.get("spread", (1.0,)))})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"machine is {name!r}, must be {', '.join(MACHINES)} or a file ({error!r})") from error


def summary(outcomes: list[Outcome], ttft: float, itl: float) -> dict[str, Any]:
    """Percentiles in seconds, and the requests per second that kept both objectives."""
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
    """Numbers of prefill and decode workers to try, at most twelve of them; none to prefill is colocated."""
    step = max(1, (workers - 1) // 11)
    return [(0, workers), *((number, workers - number) for number in range(1, workers, step))]


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
    is_validation: Annotated[
        bool,
        typer.Option("--validate", help="Compare with real servers, started here: one engine, and one of either kind."),
    ] = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Percentiles and goodput by how a number of workers is split."""
    settings = dict(locals())
    if measure_to is not None:
        print(f"{measure_to}: {measure(measure_to).cost}")
        return
    known = load_machine(machine)
    if bandwidth is not None:
        known = replace(known, bandwidth=bandwidth)
    is_file = Path(trace).is_file()
    requests = (
        read_trace(Path(trace), seed)
        if is_file
        else make_trace(trace, num_requests, rate, prompt_tokens, output_tokens, seed)
    )
    if is_validation:
        # Other requests than those that are predicted.
        others = make_trace("poisson", CALIBRATION, rate, prompt_tokens, output_tokens, seed + 1000)
        return validate(known, requests, others, settings, output, plot)
    columns = {"prefill : decode": "", "ttft p50 s": ".3f", "p90": ".3f", "p99": ".3f", "itl p50 ms": ".1f"}
    columns |= {"itl p90 ms": ".1f", "itl p99 ms": ".1f", "goodput req/s": ".2f", "kept": ".0%", "cached": ".0%"}
    report = Report("cluster-sim", settings, describe_machine(), columns, output, plot)
    rows = []
    for split in splits(workers):
        found = summary(Cluster(known, *split).run(requests), slo_ttft, slo_itl)
        rows.append((found["goodput"], split, found))
        _add(report, "both" if split[0] == 0 else f"{split[0]} : {split[1]}", found)
    goodput, (number, rest), _ = max(rows, key=lambda row: row[0])
    best = f"{number} : {rest} of prefill and decode" if number else "workers that do both"
    print(f"buy {best}: {goodput:.2f} requests per second keep their objectives")
    report.finish(y="requests per second", kind="bars")


def _add(report: Report, name: str, found: dict[str, Any]) -> None:
    ttft, itl = found["ttft"], found["itl"]
    cells = [name, *(ttft[f"p{share}"] for share in (50, 90, 99)), *(1e3 * itl[f"p{share}"] for share in (50, 90, 99))]
    report.add({"split": name}, found, [*cells, found["goodput"], found["kept"], found["cached"]])
    report.point("goodput", name, found["goodput"])


if __name__ == "__main__":
    typer.run(main)
