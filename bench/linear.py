"""Time the CPU's GEMMs with packed bf16 weights beside oneDNN's, over the shapes of SmolLM2-135M and a larger one.

    GOMP_SPINCOUNT=300000 dispec bench linear    # oneDNN's threads spin between calls as they do by default

Each call takes the next of many copies of the weight, so that none is still in a cache, as in a decode step. The
contestants take turns; times are those of the fastest round. On a busy machine oneDNN waits at barriers of OpenMP for
threads that have no core, with fewer spins up to a millisecond a call. Both are called from Python, which adds some
microseconds to each call.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor

from dispec import ops
from dispec.bench.machine import Rates, describe_machine, measure_rates
from dispec.bench.report import Output, Report
from dispec.ops.cpu import linear as cpu_linear
from dispec.ops.cpu.library import built_instruction_set

# QKV, output, gate and up, down, head; gate and up of Qwen2.5-1.5B.
SHAPES = "960x576,576x576,3072x576,576x1536,49152x576,17920x1536"
COPIES_BYTES = 2**28  # of each contestant's copies of a weight: more than caches hold
ROUNDS = 7
ROUND_SECONDS = 0.04


def contestants(features: int, columns: int, copies: int) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """Return calls of our GEMM and of oneDNN's, each with a list of copies of one weight."""
    weight = torch.randn(features, columns, dtype=torch.bfloat16)
    ours = [ops.pack(weight) for _ in range(copies)]
    theirs = [torch.ops.mkldnn._reorder_linear_weight(weight, 32) for _ in range(copies)]

    def multiply(packed: ops.PackedWeight, x: Tensor) -> Tensor:
        return cpu_linear.linear(x, packed.blocked, features, None, None, 0.0, None, is_gated=False)

    def multiply_by_onednn(packed: Tensor, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return product

    return {
        "ours": [partial(multiply, packed) for packed in ours if isinstance(packed, ops.PackedWeight)],
        "oneDNN": [partial(multiply_by_onednn, packed) for packed in theirs],
    }


def seconds_in_turn(calls: dict[str, list[Callable[[Tensor], Tensor]]], x: Tensor) -> dict[str, float]:
    """Return the seconds of a call of each contestant in its fastest round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(ROUNDS + 1):
        for name, copies in calls.items():
            begin, done = time.perf_counter(), 0
            while (spent := time.perf_counter() - begin) < ROUND_SECONDS or done < 2:
                copies[done % len(copies)](x)
                done += 1
            if index:  # the first round warms up
                times[name].append(spent / done)
    return {name: min(found) for name, found in times.items()}


def measure(report: Report, features: int, columns: int, counts: Sequence[int], rates: Rates) -> None:
    """Add a row to the report for each number of rows."""
    size = 2 * features * columns
    calls = contestants(features, columns, max(2, -(-COPIES_BYTES // size)))
    for rows in counts:
        seconds = seconds_in_turn(calls, torch.randn(rows, columns, dtype=torch.bfloat16))
        ours, theirs = seconds["ours"], seconds["oneDNN"]
        least = max(size / rates.bytes_per_second, size * rows / rates.flop_per_second)
        report.add(
            {"features": features, "columns": columns, "rows": rows},
            {"seconds": seconds, "least_seconds": least},
            [f"{features} x {columns}", rows, ours * 1e6, theirs * 1e6, ours / theirs, least / ours],
        )


def main(
    shapes: Annotated[str, typer.Option(help="Comma-separated FEATURESxCOLUMNS.")] = SHAPES,
    rows: Annotated[str, typer.Option(help="Comma-separated numbers of rows.")] = "1,2,6,16,32,128,512",
    output: Output = None,
) -> None:
    """Measure the time of our GEMMs over that of oneDNN's packed linear, for each shape and number of rows."""
    settings = dict(locals())
    if built_instruction_set() is None or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("this CPU lacks our packed weights or oneDNN's in bf16")
    columns = {"weight": "", "rows": "d", "ours us": ".1f", "oneDNN us": ".1f", "ours / oneDNN": ".2f", "limit": ".0%"}
    report = Report("linear", settings, describe_machine(), columns, output)
    rates = measure_rates(torch.device("cpu"))
    report.rates = rates.as_record()
    print(f"{torch.get_num_threads()} threads, {built_instruction_set()}: {rates.describe()}")
    with torch.inference_mode():
        for shape in shapes.split(","):
            features, width = map(int, shape.split("x"))
            measure(report, features, width, [int(count) for count in rows.split(",")], rates)
    report.finish()


if __name__ == "__main__":
    typer.run(main)
