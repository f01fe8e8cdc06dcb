"""Tokens per second at several concurrencies, beside peers that run in turns.

    dispec bench throughput --concurrency 1,6,16,32
    dispec bench throughput --concurrency 1 --prompt-tokens 2048 --output-tokens 1       # prefill
    dispec bench throughput --concurrency 8 --prompt-tokens 4096 --decode-only           # decoding at a long context
    dispec bench throughput --model qwen2.5-1.5b --peer vllm --vllm-path /tmp/vllm/site  # on a GPU, random weights

Each figure is the median of the rounds: output tokens over the seconds from first prompt to last token. With one
output token, prompt tokens count; with `--decode-only`, the prompts' time is left out. The limit is the rate that the
machine's bandwidth and matrix rate, measured at the start, allow for the same work.
"""

from typing import Annotated

import typer

from dispec.bench.limits import seconds_at_best
from dispec.bench.loading import Device, Dtype, EnforceEager, Model, config_of
from dispec.bench.machine import choose_device, describe_machine, measure_rates
from dispec.bench.peers import PeerBin, PeerGguf, PeerHf, PeerPreload, PeerPython, Peers, choose_peers, contestants
from dispec.bench.report import Output, Plot, Report
from dispec.bench.rounds import NOISY, take_turns
from dispec.bench.vllm_peer import VllmPath
from dispec.bench.workload import Workload, sizes
from dispec.engine.execution.kv_cache_memory import format_bytes


def main(
    model: Model = "smollm2",
    concurrency: Annotated[str, typer.Option(help="Numbers of simultaneous requests.")] = "1,6,16,32",
    prompt_tokens: int = 128,
    output_tokens: int = 128,
    decode_only: Annotated[bool, typer.Option(help="Leave out the prompts' time.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contestant; the median counts.")] = 3,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    enforce_eager: EnforceEager = False,
    peer: Peers = None,
    peer_python: PeerPython = None,
    peer_hf: PeerHf = None,
    peer_preload: PeerPreload = None,
    peer_bin: PeerBin = None,
    peer_gguf: PeerGguf = None,
    vllm_path: VllmPath = None,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure tokens per second beside transformers, vLLM and llama.cpp, and the share of the machine's limit."""
    settings = dict(locals())
    peers = choose_peers(peer, peer_python, peer_hf, peer_preload, peer_bin, peer_gguf, vllm_path)
    workloads = [Workload(size, prompt_tokens, output_tokens) for size in sizes(concurrency)]
    names = ("dispec", *peers.names)
    columns = {"c": "d"} | {f"{name} tok/s": ".1f" for name in names} | {f"/ {name}": ".2fx" for name in peers.names}
    columns |= {"limit tok/s": ".0f", "share": ".0%"}
    report = Report("throughput", settings, describe_machine(choose_device(device)), columns, output, plot)
    config = config_of(model)
    rates = measure_rates(choose_device(device))
    report.rates = rates.as_record()
    print(rates.describe(), flush=True)
    is_prefill = output_tokens == 1 and not decode_only
    longest = max(workload.concurrency for workload in workloads)
    room = prompt_tokens + output_tokens + 16
    with contestants(peers, model, dtype, device, longest, room, enforce_eager=enforce_eager) as running:
        for contestant in running:
            report.versions |= contestant.versions
        noisiest = 0.0
        for workload in workloads:
            counted = workload.concurrency * (prompt_tokens if is_prefill else output_tokens)
            taken = take_turns(running, workload, config.vocab_size, rounds, decode_only)
            noisiest = max(noisiest, taken.others)
            rate = {name: counted / taken.median(name) for name in names}
            ratio = {name: rate["dispec"] / rate[name] for name in peers.names}
            limit = counted / seconds_at_best(rates, config, workload, decode_only)
            report.add(
                {"concurrency": workload.concurrency, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens},
                {
                    "counts": "prompt tokens" if is_prefill else "output tokens",
                    "tokens_per_second": rate,
                    "ratio": ratio,
                    "seconds": taken.seconds,
                    "limit_tokens_per_second": limit,
                    "share_of_limit": rate["dispec"] / limit,
                    "peak_bytes": {contestant.name: contestant.peak_bytes for contestant in running},
                    "start_seconds": {contestant.name: contestant.start_seconds for contestant in running},
                    "others_cores": taken.others,
                },
                [workload.concurrency, *rate.values(), *ratio.values(), limit, rate["dispec"] / limit],
            )
            for name in names:
                report.point(name, workload.concurrency, rate[name])
            report.point("limit", workload.concurrency, limit)
        for contestant in running:
            ready = f", ready after {contestant.start_seconds:.1f} s" if contestant.start_seconds else ""
            print(f"{contestant.name}: at most {format_bytes(contestant.peak_bytes)} resident{ready}")
        if noisiest > NOISY:
            print(f"not a quiet machine: other processes took up to {noisiest:.1f} cores during the runs")
    report.finish("sequences", f"{'prompt' if is_prefill else 'output'} tokens/s")


if __name__ == "__main__":
    typer.run(main)
