"""The gain of each technique: every row has the techniques of the rows above it and one more.

    dispec bench ablations --requests 16

All rows answer the same requests, in turns. The requests arrive at once and share a prefix.
"""

from contextlib import ExitStack
from typing import Annotated, Any, NamedTuple

import typer

from dispec.bench.contestants import Contestant, dispec_engine, transformers
from dispec.bench.geometries import NAMES
from dispec.bench.loading import Device, Dtype, Model, config_of, useful_kv_memory
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.report import Output, Plot, Report
from dispec.bench.rounds import take_turns
from dispec.bench.workload import Workload
from dispec.engine.dtypes import DTYPES

# The engine on a CPU, in the rows without packed weights and kernels.
_PLAIN = {"DISPEC_PACKED_WEIGHTS": "off", "DISPEC_CPU_KERNELS": "off"}


class Row(NamedTuple):
    """A set-up: `options` of our engine, or None for transformers, and variables set in its process."""

    name: str
    options: dict[str, Any] | None
    environment: dict[str, str]


def rows(is_cuda: bool, requests: int) -> list[Row]:
    """Return the set-ups, each with one technique more than the one before."""
    options: dict[str, Any] = {"max_num_seqs": 1, "enable_prefix_caching": False, "speculative_model": None}
    environment: dict[str, str] = {}
    if is_cuda:
        options |= {"enforce_eager": True, "async_scheduling": False}
        first = "ours, eager, one at a time"
        of_device: list[tuple[str, dict[str, Any], dict[str, str]]] = [
            ("+ compiled steps, CUDA graphs", {"enforce_eager": False}, {}),
            ("+ next step prepared meanwhile", {"async_scheduling": True}, {}),
        ]
    else:
        environment = _PLAIN
        first = "ours, eager, torch's operations, one at a time"
        of_device = [
            ("+ packed weights", {}, {"DISPEC_PACKED_WEIGHTS": "on"}),
            ("+ kernels of our own", {}, {"DISPEC_CPU_KERNELS": "on"}),
        ]
    found = [Row("transformers", None, {}), Row(first, options, environment)]
    for name, change, variables in (
        *of_device,
        ("+ continuous batching", {"max_num_seqs": requests}, {}),
        ("+ prefix sharing", {"enable_prefix_caching": True}, {}),
        ("+ n-gram speculation", {"speculative_model": "ngram"}, {}),
    ):
        options, environment = options | change, environment | variables
        found.append(Row(name, options, environment))
    return found


def main(
    model: Model = "smollm2",
    requests: Annotated[int, typer.Option(min=2, help="Requests that arrive at once.")] = 16,
    shared_tokens: Annotated[int, typer.Option(min=0, help="Tokens of the shared prefix.")] = 256,
    own_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt after the prefix.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure tokens per second as techniques are added one by one."""
    settings = dict(locals())
    chosen = choose_device(device)
    workload = Workload(requests, shared_tokens + own_tokens, output_tokens, shared_tokens)
    columns = {"": "", "tok/s": ".1f", "/ the row above": ".2fx", "/ the first": ".2fx"}
    report = Report("ablations", settings, describe_machine(chosen), columns, output, plot)
    config, room = config_of(model), workload.tokens + 16
    common: dict[str, Any] = {"dtype": dtype, "device": device, "max_model_len": room}
    common["kv_cache_memory"] = useful_kv_memory(config, requests, room, DTYPES[dtype].itemsize)
    with ExitStack() as stack:
        running: list[Contestant] = []
        for row in rows(chosen.type == "cuda", requests):
            if row.options is None:
                peer = {"model": model, "is_geometry": model in NAMES, "dtype": dtype, "device": device}
                contestant = transformers(row.name, peer | {"one_at_a_time": True})
            else:
                contestant = dispec_engine(model, common | row.options, row.name, row.environment)
            stack.callback(contestant.close)
            running.append(contestant)
        taken = take_turns(running, workload, config.vocab_size, rounds)
    rates = {name: requests * output_tokens / taken.median(name) for name in taken.seconds}
    above = first = next(iter(rates.values()))
    for name, rate in rates.items():
        figures = {"tokens_per_second": rate, "ratio_to_row_above": rate / above, "ratio_to_first": rate / first}
        figures["others_cores"] = taken.others
        report.add({"row": name}, figures | {"seconds": taken.seconds[name]}, [name, rate, rate / above, rate / first])
        report.point("", name, rate)
        above = rate
    print(f"{requests} requests at once, {shared_tokens} shared and {own_tokens} own tokens in, {output_tokens} out")
    report.finish(y="output tokens/s", kind="bars")


if __name__ == "__main__":
    typer.run(main)
