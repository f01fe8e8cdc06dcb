"""Steps of the engine as shares of the machine's measured bandwidth and matrix rate.

    dispec bench roofline --concurrency 1,6,16,32 --prefill 128,512

"machine" is the time in which the machine, at its measured bandwidth and matrix rate, could read the step's weights,
keys and values once and do its GEMMs. "products" is the measured time of the step's GEMMs alone, on random numbers, by
oneDNN on packed weights or by the device's library.
"""

import functools
import statistics
from typing import Annotated, Any

import typer

from dispec.bench.limits import ELEMENT, StepGemms, decode_step_seconds, kv_bytes, prefill_seconds, weight_read_bytes
from dispec.bench.loading import Device, EnforceEager, Model, config_of, load
from dispec.bench.machine import choose_device, describe_machine, measure_rates, seconds_of
from dispec.bench.report import Output, Plot, Report
from dispec.bench.workload import Workload, sizes
from dispec.engine.engine import Engine
from dispec.engine.sampling_params import SamplingParams

_WARM_UP = 5


def decode_seconds(engine: Engine, sequences: int, context: int, steps: int) -> float:
    """Return the mean seconds of `steps` decode steps. context: tokens of each sequence at the first of them."""
    params = SamplingParams(temperature=0, max_tokens=steps + 2 * _WARM_UP, ignore_eos=True)
    added = [engine.add(prompt, params) for prompt in Workload(sequences, context).prompts(engine.config.vocab_size)]
    while engine.scheduler.waiting or not engine.records or engine.records[-1].kind != "decode":
        engine.step()
    for _ in range(_WARM_UP):
        engine.step()

    def run() -> None:
        for _ in range(steps):
            engine.step()

    seconds = seconds_of(run, engine.device) / steps
    for sequence in added:
        engine.abort(sequence)
    while engine.has_work:
        engine.step()
    engine.records.clear()
    return seconds


def prompt_seconds(engine: Engine, tokens: int, rounds: int) -> float:
    """Return the median seconds of `rounds` prompts of `tokens` tokens, up to the first output token."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    def run(seed: int) -> None:
        engine.add(Workload(1, tokens, 1).prompts(engine.config.vocab_size, seed)[0], params)
        while engine.has_work:
            engine.step()

    run(0)
    seconds = statistics.median(
        seconds_of(functools.partial(run, seed), engine.device) for seed in range(1, rounds + 1)
    )
    engine.records.clear()
    return seconds


def main(
    model: Model = "smollm2",
    concurrency: Annotated[str, typer.Option(help="Sequences of the decode steps.")] = "1,6,16,32",
    context: Annotated[int, typer.Option(min=1, help="Tokens that each sequence has.")] = 192,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to measure.")] = 40,
    prefill: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "128,512,2048",
    rounds: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 3,
    device: Device = None,
    enforce_eager: EnforceEager = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure steps as shares of the machine's bandwidth and matrix rate."""
    settings = dict(locals())
    batches, prompts = sizes(concurrency), sizes(prefill)
    chosen = choose_device(device)
    columns = {"step": "", "ms": ".2f", "tok/s": ".0f", "GB/s": ".1f", "TFLOP/s": ".2f", "machine ms": ".2f"}
    columns |= {"share": ".0%", "products ms": ".2f", "share ": ".0%"}
    report = Report("roofline", settings, describe_machine(chosen), columns, output, plot)
    rates = measure_rates(chosen)
    report.rates = rates.as_record()
    print(rates.describe(), flush=True)
    config = config_of(model)
    gemms = StepGemms(config, chosen)
    alone = {num_tokens: gemms.seconds(num_tokens) for num_tokens in {*batches, *prompts}}
    del gemms
    llm = load(
        model,
        device=device,
        max_num_seqs=max(batches),
        max_model_len=max(*prompts, context + steps + 3 * _WARM_UP) + 16,
        enforce_eager=enforce_eager,
    )
    weights = weight_read_bytes(config)

    def add(kind: str, size: int, tokens: int, moved: float, seconds: float, machine: float) -> None:
        flops = 2 * weights / ELEMENT * tokens
        figures: dict[str, Any] = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "bytes_per_second": moved / seconds,
            "flop_per_second": flops / seconds,
            "machine_seconds": machine,
            "products_seconds": alone[size],
        }
        row = [f"{kind} {size}", seconds * 1e3, tokens / seconds, moved / seconds / 1e9, flops / seconds / 1e12]
        row += [machine * 1e3, machine / seconds, alone[size] * 1e3, alone[size] / seconds]
        report.add({"step": kind, "size": size}, figures, row)
        report.point("of the machine", f"{kind} {size}", 100 * machine / seconds)

    for size in batches:
        seconds = decode_seconds(llm.engine, size, context, steps)
        middle = context + _WARM_UP + steps / 2
        moved = weights + kv_bytes(config, size) * middle
        add("decode", size, size, moved, seconds, decode_step_seconds(rates, config, size, middle))
    for tokens in prompts:
        seconds = prompt_seconds(llm.engine, tokens, rounds)
        moved = weights + kv_bytes(config, tokens)
        add("prompt", tokens, tokens, moved, seconds, prefill_seconds(rates, config, tokens))
    report.finish(y="% of what the machine could do", kind="bars")


if __name__ == "__main__":
    typer.run(main)
