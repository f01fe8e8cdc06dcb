"""Peak resident memory while one request of a long context runs, beside the peers'.

    dispec bench memory --context 2048

The allowance is 1.3 times the weights and the KV of the context in bf16, plus 350 MB. Resident memory is summed over a
process and its children; on CUDA it is host memory.
"""

from typing import Annotated

import typer

from dispec.bench.limits import kv_bytes, weight_bytes
from dispec.bench.loading import Device, Dtype, EnforceEager, Model, config_of
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.peers import PeerBin, PeerGguf, PeerHf, PeerPreload, PeerPython, Peers, choose_peers, contestants
from dispec.bench.report import Output, Plot, Report
from dispec.bench.rounds import take_turns
from dispec.bench.workload import Workload


def allowance(weights: int, kv: int) -> float:
    """Return the bytes that the resident set may have."""
    return 1.3 * (weights + kv) + 350e6


def main(
    model: Model = "smollm2",
    context: Annotated[int, typer.Option(min=32, help="Tokens of the request, prompt and answer.")] = 2048,
    output_tokens: Annotated[int, typer.Option(min=1, help="Of these, generated tokens.")] = 16,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    enforce_eager: EnforceEager = False,
    peer: Peers = None,
    peer_python: PeerPython = None,
    peer_hf: PeerHf = None,
    peer_preload: PeerPreload = None,
    peer_bin: PeerBin = None,
    peer_gguf: PeerGguf = None,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure resident memory with one request of a long context, beside the peers'."""
    settings = dict(locals())
    peers = choose_peers(peer, peer_python, peer_hf, peer_preload, peer_bin, peer_gguf)
    workload = Workload(1, context - output_tokens, output_tokens)
    columns = {"": "", "peak MB": ".0f", "weights MB": ".0f", "KV MB": ".0f", "allowance MB": ".0f", "share": ".0%"}
    report = Report("memory", settings, describe_machine(choose_device(device)), columns, output, plot)
    config = config_of(model)
    weights, kv = weight_bytes(config), kv_bytes(config, context)
    allowed = allowance(weights, kv)
    with contestants(peers, model, dtype, device, 1, context, enforce_eager=enforce_eager) as running:
        for contestant in running:
            report.versions |= contestant.versions
        take_turns(running, workload, config.vocab_size, rounds=1)
        for contestant in running:
            peak = contestant.peak_bytes
            report.add(
                {"contestant": contestant.name},
                {"peak_bytes": peak, "weight_bytes": weights, "kv_bytes": kv, "allowance_bytes": allowed},
                [contestant.name, peak / 1e6, weights / 1e6, kv / 1e6, allowed / 1e6, peak / allowed],
            )
            report.point("", contestant.name, peak / 1e6)
    report.finish(y="peak resident MB", kind="bars")


if __name__ == "__main__":
    typer.run(main)
