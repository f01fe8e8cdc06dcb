"""What scheduling costs beside the model: milliseconds of `schedule` and `commit` for one decode step.

    python -m bench.scheduler --sequences 16,64,256 --context 128,1024,8192

No model runs: a step's tokens are made up. The cost should grow with the number of running sequences and not with
their length.
"""

import statistics
import time
from typing import Annotated, NamedTuple

import typer

from engine.block_pool import BlockPool
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.step import StepResult

WARM_UP = 20


class Cost(NamedTuple):
    """Milliseconds of one step."""

    schedule: float
    commit: float


def running(num_sequences: int, context: int, steps: int, block_size: int) -> Scheduler:
    """A scheduler whose sequences have all computed their prompts, with nothing in common, and run on."""
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
    result = StepResult({work.sequence.id: 7 for work in step.work if work.samples})
    ran = time.perf_counter()
    scheduler.commit(step, result)
    return Cost((scheduled - start) * 1e3, (time.perf_counter() - ran) * 1e3)


def measure(num_sequences: int, context: int, steps: int, block_size: int) -> list[Cost]:
    """The cost of each of `steps` decode steps."""
    scheduler = running(num_sequences, context, steps, block_size)
    costs = [decode(scheduler) for _ in range(WARM_UP + steps)][WARM_UP:]
    scheduler.check()
    assert len(scheduler.running) == num_sequences
    return costs


def main(
    sequences: Annotated[str, typer.Option(help="Numbers of running sequences.")] = "16,64,256",
    context: Annotated[str, typer.Option(help="Tokens of each prompt.")] = "128,1024,8192",
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to measure.")] = 500,
    block_size: int = 16,
) -> None:
    """Measure schedule and commit and print a table."""
    print(
        f"{'sequences':>9} {'context':>8} {'median ms':>10} {'p99 ms':>8} {'schedule':>9} {'commit':>8} {'us/seq':>7}"
    )
    for num_sequences in map(int, sequences.split(",")):
        for tokens in map(int, context.split(",")):
            costs = measure(num_sequences, tokens, steps, block_size)
            totals = sorted(map(sum, costs))
            median, worst = statistics.median(totals), totals[int(0.99 * (len(totals) - 1))]
            schedule, commit = (statistics.median(values) for values in zip(*costs, strict=True))
            print(
                f"{num_sequences:>9} {tokens:>8} {median:>8.3f} {worst:>8.3f} {schedule:>9.3f} {commit:>8.3f}   "
                f" {median / num_sequences * 1e3:>7.2f}"
            )


if __name__ == "__main__":
    typer.run(main)
