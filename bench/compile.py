"""Compile times of a start with a cold and with a warm cache, and counts of graphs and kernels.

    dispec bench compile

Each start is a new process, which then answers requests of many kinds. "graphs" counts the graphs that Dynamo traced
at start, and "later" those traced while requests ran (expected: 0). On CUDA, "skipped" counts functions that were not
recorded as CUDA graphs (expected: 0), and "moving" inputs that each replay copies because their addresses may change.
"""

import json
import subprocess
import sys
from typing import Annotated, Any

import typer

from dispec.bench.compile_cache import fresh_cache
from dispec.bench.contestants import ROOT
from dispec.bench.loading import Device, Dtype, Model
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.report import Output, Plot, Report


def start_once(options: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Start an engine in a new process and return the output of `bench.compile_probe`. Raises RuntimeError."""
    command = [sys.executable, "-m", "dispec.bench.compile_probe", json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError("the engine did not start: " + "\n".join(done.stderr.strip().splitlines()[-15:]))
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(
    model: Model = "smollm2",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most sequences at once; 1 compiles less.")] = 16,
    max_model_len: Annotated[int, typer.Option(min=64)] = 512,
    warm_starts: Annotated[int, typer.Option(min=0, help="Starts after the cold one.")] = 2,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure cold and warm compile times by phase; count graphs, kernels and recompilations."""
    settings = dict(locals())
    chosen = choose_device(device)
    options = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len, "dtype": dtype, "device": device}
    options["compile"] = "startup"
    seconds = dict.fromkeys(("import s", "find s", "load s", "compile s"), ".2f")
    counts = ["graphs", "kernels", "cached", "later", *(["skipped", "moving"] if chosen.type == "cuda" else [])]
    columns = {"start": ""} | seconds | dict.fromkeys(counts, "d")
    report = Report("compile", settings, describe_machine(chosen), columns, output, plot)
    with fresh_cache() as environment:
        for number in range(1 + warm_starts):
            name = "cold" if number == 0 else f"warm {number}"
            found = start_once({"model": model, **options}, environment)
            phases = found["phase_seconds"]
            cells = [phases.get(column.removesuffix(" s"), 0.0) for column in seconds]
            report.add({"start": name}, found, [name, *cells, *(found[count] for count in counts)])
            for phase, taken in phases.items():
                report.point(phase, f"{name}: {phase}", taken)
    report.finish(y="seconds", kind="bars")


if __name__ == "__main__":
    typer.run(main)
