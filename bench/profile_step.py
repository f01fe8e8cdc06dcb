"""Time of a start and of a decode step by host phase and device kernel.

    dispec bench profile-step --model qwen2.5-1.5b --concurrency 1

Writes a trace for https://ui.perfetto.dev with --trace.
"""

import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer

from dispec.bench.loading import Device, Dtype, EnforceEager, Model, load
from dispec.bench.machine import describe_machine
from dispec.bench.report import Output, Report
from dispec.bench.workload import Workload
from dispec.engine.sampling_params import SamplingParams


def main(
    model: Model = "smollm2",
    concurrency: Annotated[int, typer.Option(min=1, help="Sequences of the step.")] = 1,
    context: Annotated[int, typer.Option(help="Prompt tokens of each sequence.")] = 128,
    steps: Annotated[int, typer.Option(help="Decode steps to measure.")] = 50,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    enforce_eager: EnforceEager = False,
    compile: Annotated[str | None, typer.Option(help="startup or off.", show_default="the engine's default")] = None,
    top: Annotated[int, typer.Option(help="Kernels to list.")] = 15,
    trace: Annotated[Path | None, typer.Option(help="Write a Perfetto trace here.")] = None,
    output: Output = None,
) -> None:
    """Profile a start and a decode step: host phases, device kernels, idle time."""
    settings = dict(locals())
    llm = load(
        model,
        dtype=dtype,
        device=device,
        max_num_seqs=concurrency,
        max_model_len=context + 3 * steps + 32,
        enforce_eager=enforce_eager,
        compile=compile,
    )
    engine = llm.engine
    columns = {"": "", "ms a step": ".3f", "calls a step": ".1f"}
    report = Report("profile-step", settings, describe_machine(engine.device), columns, output)
    print(
        f"ready {_age():.1f} s after the process began, of which "
        + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in engine.phase_seconds.items())
    )
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    print(f"first token after {_age():.1f} s")
    on_cuda = engine.device.type == "cuda"
    params = SamplingParams(temperature=0, max_tokens=3 * steps + 16, ignore_eos=True)
    for prompt in Workload(concurrency, context).prompts(engine.config.vocab_size):
        engine.add(prompt, params)
    while engine.scheduler.waiting or not engine.records or engine.records[-1].kind != "decode":
        engine.step()
    for _ in range(10):
        engine.step()
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    wall = time.perf_counter() - start
    print(f"{model}, {concurrency} sequences, context {context}: {wall / steps * 1e3:.3f} ms a step unprofiled")
    report.add({"part": "step"}, {"seconds": wall / steps}, ["step", wall / steps * 1e3, None])
    records = list(engine.records)[-steps:]
    for phase in ("schedule", "launch", "wait", "commit"):
        seconds = sum(getattr(record, phase) for record in records) / steps
        report.add({"part": phase}, {"seconds": seconds}, [f"  {phase}", seconds * 1e3, None])
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            engine.step()
    kind = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
    total: defaultdict[str, float] = defaultdict(float)
    count: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == kind:
            total[event.name] += event.self_device_time_total if on_cuda else event.self_cpu_time_total
            count[event.name] += 1
    busy, calls = sum(total.values()) / steps / 1e6, sum(count.values()) / steps
    part = "kernels" if on_cuda else "ops"
    report.add({"part": part}, {"seconds": busy, "calls": calls}, [f"{part}, profiled", busy * 1e3, calls])
    for name, microseconds in sorted(total.items(), key=lambda item: -item[1])[:top]:
        seconds, calls = microseconds / steps / 1e6, count[name] / steps
        row = [f"  {name[:100]}", seconds * 1e3, calls]
        report.add({"part": part, "name": name}, {"seconds": seconds, "calls": calls}, row)
    if on_cuda:
        launches = sum(event.name == "cudaGraphLaunch" for event in profile.events()) / steps
        report.add({"part": "graph launches"}, {"calls": launches}, ["graph launches", None, launches])
    report.finish()
    if trace is not None:
        profile.export_chrome_trace(str(trace))


def _age() -> float:
    """Seconds since this process began."""
    return time.time() - psutil.Process().create_time()


if __name__ == "__main__":
    typer.run(main)
