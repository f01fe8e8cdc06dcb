"""Contestants take turns on a workload, so that drift of the machine affects all of them."""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from dispec.bench.contestants import Contestant
from dispec.bench.resident_memory import machine_cpu_seconds
from dispec.bench.workload import Workload

NOISY = 0.1  # cores used by other processes, above which a run counts as disturbed


class Taken(NamedTuple):
    """Seconds of each round by contestant. others: cores used by all other processes in the median round."""

    seconds: dict[str, list[float]]
    others: float

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def take_turns(
    contestants: Sequence[Contestant], workload: Workload, vocab_size: int, rounds: int, decode_only: bool = False
) -> Taken:
    """Run the workload `rounds` times on each contestant, after one run that warms caches and allocators."""
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
