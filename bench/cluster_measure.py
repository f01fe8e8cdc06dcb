"""What a step costs on this machine: the lines, spreads and slowdowns that a simulated cluster is made of.

Each worker is a process of its own with its own number of threads, as `dispec serve` has them: `python -m
bench.cluster_measure THREADS` says "ready", measures when it is told "go", writes one line of JSON, and goes on
computing until its standard input ends, so that a worker beside it has company all the time.
"""

import json
import os
import select
import statistics
import subprocess
import sys
from collections import defaultdict
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from dispec.bench.cluster import StepCost
from dispec.bench.contestants import ROOT

# Prompts and their length.
_SHAPES = ((1, 64), (1, 200), (1, 400), (4, 300), (8, 128), (16, 64), (32, 32), (1, 1500), (6, 1000))
_OUTPUT = 64


class Steps(NamedTuple):
    """Of each step: 1, prompt tokens, sequences that decode and what they attend to; its shape; its seconds."""

    rows: list[tuple[float, float, float, float]]
    shapes: list[int]
    seconds: list[float]

    def cost(self) -> StepCost:
        """Least squares, in which relative errors count alike."""
        weights = 1 / np.array(self.seconds)
        found = np.linalg.lstsq(np.array(self.rows) * weights[:, None], np.array(self.seconds) * weights, rcond=None)[0]
        return StepCost(*(max(0.0, float(value)) for value in found))

    def spread(self) -> tuple[float, ...]:
        """How many times as long as others of the same shape decode steps took: 101 of them, from least to most."""
        groups = defaultdict(list)
        for row, shape, seconds in zip(self.rows, self.shapes, self.seconds, strict=True):
            if not row[1]:
                groups[shape].append(seconds)
        ratios = [one / statistics.median(group) for group in groups.values() for one in group]
        return tuple(float(one) for one in np.quantile(ratios, np.linspace(0, 1, 101)))


def steps(num_threads: int, num_workers: int = 1) -> list[Steps]:
    """What each of some workers measures while all of them compute."""
    with ExitStack() as stack:
        workers = [stack.enter_context(_started(num_threads)) for _ in range(num_workers)]
        for worker in workers:
            _said(worker)
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        found = [Steps(**json.loads(_said(worker))) for worker in workers]
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.close()
        return found


def slowdown(alone: Steps, together: list[Steps]) -> float:
    """How many times as long a step takes beside another worker; the steps are the same ones."""
    ratios = [b / a for steps in together for a, b in zip(alone.seconds, steps.seconds, strict=True)]
    return max(1.0, statistics.median(ratios))


def _started(num_threads: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "dispec.bench.cluster_measure", str(num_threads)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(num_threads)},
    )


def _said(worker: "subprocess.Popen[str]") -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker that measures ended with code {worker.wait()}")
    return line


def _main() -> None:
    from dispec.engine.api.llm import LLM
    from dispec.engine.sampling_params import SamplingParams  # torch: only in the worker

    llm = LLM("smollm2", max_num_seqs=32, max_model_len=4096)
    rng = np.random.default_rng(0)
    prompts = [[rng.integers(0, 32000, length).tolist() for _ in range(count)] for count, length in _SHAPES]
    params = SamplingParams(temperature=0, max_tokens=_OUTPUT, ignore_eos=True)

    def generate(some: list[list[int]], salt: str) -> None:
        llm.engine.records.clear()
        for prompt in some:
            llm.engine.add(prompt, params, cache_salt=salt)
        while llm.engine.has_work:
            llm.engine.step()

    for some in prompts:  # what each shape needs once, memory above all, is not what it costs
        generate(some, "warm")
    print("ready", flush=True)
    sys.stdin.readline()
    found: dict[str, list[Any]] = {"rows": [], "shapes": [], "seconds": []}
    for shape, some in enumerate(prompts):
        generate(some, "measured")
        for record in llm.engine.records:
            decodes = record.num_tokens - record.num_prompt_tokens
            context = record.num_used_blocks * llm.engine.options.block_size if decodes else 0
            found["rows"].append((1.0, record.num_prompt_tokens, decodes, context))
            found["shapes"].append(shape)
            found["seconds"].append(record.seconds)
    print(json.dumps(found), flush=True)
    turn = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        turn += 1
        generate(prompts[turn % len(prompts)], f"again {turn}")
    os._exit(0)


if __name__ == "__main__":
    _main()
