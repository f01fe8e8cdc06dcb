"""Seconds to the first token and between tokens inside one process, without HTTP and text.

    dispec bench latency --concurrency 1,4

All prompts arrive at once: the time to the first token includes the other prompts.
"""

import itertools
import statistics
import time
from typing import Annotated

import typer
from tqdm import tqdm

from dispec.bench.loading import Device, Dtype, EnforceEager, Model, load
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.report import Output, Plot, Report
from dispec.bench.workload import Workload, sizes
from dispec.engine.engine import Engine
from dispec.engine.sampling_params import SamplingParams


def token_times(engine: Engine, prompts: list[list[int]], output_tokens: int) -> list[list[float]]:
    """Return each prompt's token arrivals, in seconds since all prompts were added."""
    params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    start = time.perf_counter()
    times: dict[str, list[float]] = {engine.add(prompt, params).request_id: [] for prompt in prompts}
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            times[output.request_id].append(now)
    return list(times.values())


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile."""
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}


def main(
    model: Model = "smollm2",
    concurrency: Annotated[str, typer.Option(help="Numbers of simultaneous requests.")] = "1,4,16",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(min=2)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    enforce_eager: EnforceEager = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure seconds to the first token and between tokens."""
    settings = dict(locals())
    workloads = [Workload(size, prompt_tokens, output_tokens) for size in sizes(concurrency)]
    columns = {"c": "d"} | dict.fromkeys(("ttft p50 ms", "ttft p99 ms", "itl p50 ms", "itl p99 ms"), ".2f")
    report = Report("latency", settings, describe_machine(choose_device(device)), columns, output, plot)
    llm = load(
        model,
        dtype=dtype,
        device=device,
        max_num_seqs=max(workload.concurrency for workload in workloads),
        max_model_len=prompt_tokens + output_tokens + 16,
        enforce_eager=enforce_eager,
    )
    engine = llm.engine
    for workload in workloads:
        first: list[float] = []
        gaps: list[float] = []
        for round_ in tqdm(range(rounds + 1), desc=f"c={workload.concurrency}", leave=False, disable=None):
            for times in token_times(engine, workload.prompts(engine.config.vocab_size, round_), output_tokens):
                if round_ > 0:  # the first run warms caches and allocators
                    first.append(times[0])
                    gaps += [later - earlier for earlier, later in itertools.pairwise(times)]
        figures = {"ttft_seconds": spread(first), "itl_seconds": spread(gaps)}
        cells = [value * 1e3 for figure in figures.values() for value in figure.values()]
        report.add({"concurrency": workload.concurrency}, figures, [workload.concurrency, *cells])
        report.point("to the first token, p50", workload.concurrency, cells[0])
        report.point("between tokens, p50", workload.concurrency, cells[2])
    report.finish("sequences", "ms")


if __name__ == "__main__":
    typer.run(main)
