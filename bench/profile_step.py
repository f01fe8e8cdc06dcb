"""Where the time of a decode step goes: host phases, device kernels, idle.

    python -m bench.profile_step --model qwen2.5-1.5b --concurrency 1

Writes a trace for https://ui.perfetto.dev with --trace.
"""

import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.geometries import NAMES, model_config
from bench.workload import Workload
from engine import LLM, SamplingParams


def main(
    model: str = "smollm2",
    concurrency: int = 1,
    context: Annotated[int, typer.Option(help="Prompt tokens of each sequence.")] = 128,
    steps: Annotated[int, typer.Option(help="Decode steps to measure.")] = 50,
    dtype: str = "bfloat16",
    device: str | None = None,
    enforce_eager: bool = False,
    top: Annotated[int, typer.Option(help="Kernels to list.")] = 15,
    trace: Annotated[Path | None, typer.Option(help="Write a Perfetto trace here.")] = None,
) -> None:
    """Profile decode steps and print a table."""
    named = model in NAMES
    llm = LLM(
        model_config(model) if named else model,
        load_format="dummy" if named else "auto",
        dtype=dtype,
        device=device,
        max_num_seqs=concurrency,
        max_model_len=context + 3 * steps + 32,
        enforce_eager=enforce_eager,
        show_progress=True,
    )
    engine = llm.engine
    print("start: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in engine.phase_seconds.items()))
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
    records = list(engine.records)[-steps:]
    for phase in ("schedule", "launch", "wait", "commit"):
        milliseconds = sum(getattr(record, phase) for record in records) / steps * 1e3
        print(f"  {phase:<10} {milliseconds:8.3f} ms")
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
    busy = sum(total.values()) / steps / 1e3
    print(f"{'kernels' if on_cuda else 'ops'}: {busy:.3f} ms a step in {sum(count.values()) / steps:.0f} calls")
    for name, microseconds in sorted(total.items(), key=lambda item: -item[1])[:top]:
        print(f"  {microseconds / steps / 1e3:8.3f} ms {count[name] / steps:7.1f} x  {name[:100]}")
    if trace is not None:
        profile.export_chrome_trace(str(trace))


if __name__ == "__main__":
    typer.run(main)
