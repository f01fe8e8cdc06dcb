"""Contestants take turns on a workload, so that a drift of the machine hits all of them; medians count."""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from dispec.bench.contestants import Contestant
from dispec.bench.resident_memory import machine_cpu_seconds
from dispec.bench.workload import Workload

NOISY = 0.1  # of a core, from which on others are said to have disturbed


class Taken(NamedTuple):
    """Seconds of each round of each contestant; `others` is the share of a core that went, in the median round, to
    processes other than the one whose turn it was, sleeping contestants included."""

    seconds: dict[str, list[float]]
    others: float

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def take_turns(
    contestants: Sequence[Contestant], workload: Workload, vocab_size: int, rounds: int, decode_only: bool = False
) -> Taken:
    """Run the workload `rounds` times on each contestant, after once that warms caches and allocators."""
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    others: list[float] = []
    turns = [(round_, contestant) for round_ in range(rounds + 1) for contestant in contestants]
    for round_, contestant in tqdm(turns, desc=f"c={workload.concurrency}", unit="run", leave=False, disable=None):
        prompts = workload.prompts(vocab_size, seed=round_)
        start, machine, own = time.perf_counter(), machine_cpu_seconds(), contestant.cpu()
        taken = contestant.run(workload, prompts, decode_only)
        spent = machine_cpu_seconds() - machine - (contestant.cpu() - own)
        if round_ > 0:
            seconds[contestant.name].append(taken)
            others.append(max(0.0, spent / (time.perf_counter() - start)))
    return Taken(seconds, statistics.median(others))
