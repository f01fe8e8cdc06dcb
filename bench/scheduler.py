"""Milliseconds of `schedule` and `commit` of one decode step, without a model.

    dispec bench scheduler --sequences 16,64,256 --context 128,1024,8192

No model runs: a step's tokens are made up. The cost should grow with the number of running sequences and not with
their length.
"""

import statistics
import time
from typing import Annotated, NamedTuple

import typer

from dispec.bench.machine import describe_machine
from dispec.bench.report import Output, Plot, Report
from dispec.bench.workload import sizes
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.block_pool import BlockPool
from dispec.engine.scheduling.scheduler import Scheduler
from dispec.engine.scheduling.scheduler_output import ModelRunnerOutput
from dispec.engine.scheduling.sequence import Sequence

WARM_UP = 20


class Cost(NamedTuple):
    """Milliseconds of one step."""

    schedule: float
    commit: float


def running(num_sequences: int, context: int, steps: int, block_size: int) -> Scheduler:
    """Return a scheduler of decoding sequences that share no prefix."""
    max_len = context + steps + 2 * WARM_UP
    num_blocks = num_sequences * -(-max_len // block_size) + num_sequences
    scheduler = Scheduler(BlockPool(num_blocks + 1, block_size), num_sequences, num_sequences * context)
    params = SamplingParams(max_tokens=max_len)
    for index in range(num_sequences):
        prompt = [index + 1, *range(1, context)]
        scheduler.add(Sequence(index, prompt, params, 0, frozenset((0,)), max_len, arrival_time=float(index)))
    while scheduler.waiting or any(sequence.num_uncomputed_tokens > 1 for sequence in scheduler.running):
        decode(scheduler)
    assert len(scheduler.running) == num_sequences
    return scheduler


def decode(scheduler: Scheduler) -> Cost:
    """Schedule and commit one step."""
    start = time.perf_counter()
    step = scheduler.schedule()
    scheduled = time.perf_counter()
    result = ModelRunnerOutput(
        {scheduled.sequence.id: [7] for scheduled in step.scheduled_sequences if scheduled.samples}
    )
    ran = time.perf_counter()
    scheduler.commit(step, result)
    return Cost((scheduled - start) * 1e3, (time.perf_counter() - ran) * 1e3)


def measure(num_sequences: int, context: int, steps: int, block_size: int) -> list[Cost]:
    """Return the cost of each of `steps` decode steps."""
    scheduler = running(num_sequences, context, steps, block_size)
    costs = [decode(scheduler) for _ in range(WARM_UP + steps)][WARM_UP:]
    scheduler.check()
    assert len(scheduler.running) == num_sequences
    return costs


def main(
    sequences: Annotated[str, typer.Option(help="Numbers of running sequences.")] = "16,64,256",
    context: Annotated[str, typer.Option(help="Tokens of each prompt.")] = "128,1024,8192",
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to measure.")] = 500,
    block_size: Annotated[int, typer.Option(min=1)] = 16,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure the scheduling of a decode step without a model."""
    settings = dict(locals())
    milliseconds = dict.fromkeys(("median ms", "p99 ms", "schedule", "commit"), ".3f")
    columns = {"sequences": "d", "context": "d"} | milliseconds | {"us/seq": ".2f"}
    report = Report("scheduler", settings, describe_machine(), columns, output, plot)
    for tokens in sizes(context):
        for num_sequences in sizes(sequences):
            costs = measure(num_sequences, tokens, steps, block_size)
            totals = sorted(map(sum, costs))
            median, worst = statistics.median(totals), totals[int(0.99 * (len(totals) - 1))]
            schedule, commit = (statistics.median(values) for values in zip(*costs, strict=True))
            figures = {"median": median, "p99": worst, "schedule": schedule, "commit": commit}
            report.add(
                {"sequences": num_sequences, "context": tokens},
                {f"{name}_seconds": value / 1e3 for name, value in figures.items()},
                [num_sequences, tokens, *figures.values(), median / num_sequences * 1e3],
            )
            report.point(f"context {tokens}", num_sequences, median)
    report.finish("running sequences", "ms a step")


if __name__ == "__main__":
    typer.run(main)
