"""Tokens per second of one model in several weight formats, in turn, beside llama.cpp's and vLLM's formats.

    dispec bench formats --formats bfloat16,int8,int4,native
    dispec bench formats --formats bfloat16,bfloat16+kv-int8,bfloat16+kv-fp8 --concurrency 8 --prompt-tokens 4096 \
        --decode-only --prefill ""    # the KV cache at a long context
    dispec bench formats --peer-bin llama-batched-bench --gguf q8_0=model-q8_0.gguf --gguf q4_1=model-q4_1.gguf
    dispec bench formats --model qwen2.5-7b --formats bfloat16,int4-128,fp8 --vllm-path /tmp/vllm/site --vllm gptq,fp8

Each format is an engine in a process of its own. All are started, sleep, and take turns on the same prompts. The first
format is the one that the others are compared with. vLLM runs the shapes of a named model with random weights.
"""

import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dispec.bench.contestants import Contestant, LlamaCpp, dispec_engine, started
from dispec.bench.loading import Device, Model, config_of, useful_kv_memory
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.peers import PeerBin
from dispec.bench.report import Output, Report
from dispec.bench.rounds import NOISY, take_turns
from dispec.bench.vllm_peer import VLLM, VllmPath, memory_on_cuda
from dispec.bench.weight_formats import format_options
from dispec.bench.workload import Workload, sizes

START_SECONDS = 400.0  # that vLLM may take, beside others that compile

# As vLLM reads them from config.json.
VLLM_FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "gptq": {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    },
    "fp8": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
}


def main(
    model: Model = "smollm2",
    formats: Annotated[str, typer.Option(help="Comma-separated; see bench/weight_formats.py.")] = "bfloat16,int8,int4",
    concurrency: Annotated[str, typer.Option(help="Numbers of simultaneous requests.")] = "1,16,32",
    prompt_tokens: int = 128,
    output_tokens: int = 128,
    decode_only: Annotated[bool, typer.Option(help="Leave out the prompts' time.")] = False,
    prefill: Annotated[str, typer.Option(help="Lengths of single prompts to time; empty for none.")] = "512",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contestant; the median counts.")] = 3,
    device: Device = None,
    peer_bin: PeerBin = None,
    gguf: Annotated[list[str] | None, typer.Option(help="llama.cpp: NAME=FILE; can be given several times.")] = None,
    vllm_path: VllmPath = None,
    vllm: Annotated[str, typer.Option(help=f"vLLM's formats: {', '.join(VLLM_FORMATS)}.")] = "gptq",
    minutes: Annotated[float, typer.Option(help="Begin no workload after this long.")] = 60.0,
    output: Output = None,
) -> None:
    """Measure tokens per second of weight formats, beside llama.cpp's and vLLM's."""
    settings = dict(locals())
    end = time.monotonic() + 60 * minutes
    names = [name.strip() for name in formats.split(",")]
    options = {name: format_options(name) for name in names}
    lengths = [int(length) for length in prefill.split(",") if length.strip()]
    workloads = [Workload(size, prompt_tokens, output_tokens) for size in sizes(concurrency)]
    workloads += [Workload(1, length, 1) for length in lengths]
    peers = [f"llama.cpp {given.split('=', 1)[0]}" for given in gguf or []]
    peers += [f"vllm {name.strip()}" for name in vllm.split(",")] if vllm_path is not None else []
    columns = {"workload": ""} | {f"{name} tok/s": ".1f" for name in [*names, *peers]}
    columns |= {f"{name} / {names[0]}": ".2fx" for name in names[1:]}
    chosen = choose_device(device)
    report = Report("formats", settings, describe_machine(chosen), columns, output)
    with contextlib.ExitStack() as stack:
        config = config_of(model)
        longest, most = max(workload.tokens for workload in workloads) + 16, max(sizes(concurrency))
        common = {"max_num_seqs": most, "max_model_len": longest}
        memory = useful_kv_memory(config, most, longest, 2)
        starts: dict[str, Callable[[], Contestant]] = {}
        for name in names:
            ours = {"device": device, "kv_cache_memory": memory} | common | options[name]
            starts[name] = functools.partial(dispec_engine, model, ours, name)
        for given in gguf or []:
            name, _, path = given.partition("=")
            if peer_bin is None:
                raise ValueError("--gguf needs --peer-bin")
            starts[f"llama.cpp {name}"] = functools.partial(
                LlamaCpp, peer_bin.absolute(), Path(path).absolute(), torch.get_num_threads()
            )
        if vllm_path is not None:
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dispec-bench-formats-")))
            theirs = common | {"enable_prefix_caching": False} | memory_on_cuda(memory)
            for name in map(str.strip, vllm.split(",")):
                peer = VLLM(site=vllm_path, config=VLLM_FORMATS[name])
                starts[f"vllm {name}"] = functools.partial(
                    peer.start, model, theirs, cache / name, is_cuda=True, patience=START_SECONDS
                )
        running = stack.enter_context(started(starts))
        for contestant in running:
            report.versions |= contestant.versions
        noisiest = 0.0
        for workload in workloads:
            if time.monotonic() > end:
                print(f"{workload}: no time left", flush=True)
                continue
            is_prefill = workload.output_tokens == 1
            counted = workload.concurrency * (workload.prompt_tokens if is_prefill else workload.output_tokens)
            taken = take_turns(running, workload, config.vocab_size, rounds, decode_only and not is_prefill)
            noisiest = max(noisiest, taken.others)
            rates = {name: counted / taken.median(name) for name in taken.seconds}
            label = f"prefill {workload.prompt_tokens}" if is_prefill else f"c={workload.concurrency}"
            ratios = {name: rates[name] / rates[names[0]] for name in names[1:] if name in rates}
            report.add(
                {
                    "concurrency": workload.concurrency,
                    "prompt_tokens": workload.prompt_tokens,
                    "is_prefill": is_prefill,
                },
                {
                    "tokens_per_second": rates,
                    "ratio": ratios,
                    "seconds": taken.seconds,
                    "peak_bytes": {contestant.name: contestant.peak_bytes for contestant in running},
                    "others_cores": taken.others,
                },
                [label, *(rates.get(name) for name in [*names, *peers]), *(ratios.get(name) for name in names[1:])],
            )
            print(label, json.dumps({name: round(rate, 1) for name, rate in rates.items()}), flush=True)
        if noisiest > NOISY:
            print(f"not a quiet machine: other processes took up to {noisiest:.1f} cores during the runs")
        report.finish()


if __name__ == "__main__":
    typer.run(main)
