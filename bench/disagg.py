"""Rate at which the KV blocks of a prompt move from one engine process to another, by transport.

    dispec bench disagg --tokens 512 --tokens 2048

Two processes have KV caches with the geometry of a real model, and no model. Blocks are scattered, as after hours of
service. "pull" moves blocks published before: from the call to the event, checksums verified. "whole" begins with the
publishing: the source computes checksums meanwhile. "copy" moves the same bytes within one process. With
`--device cuda` both caches are on the same GPU; with `--source-device cuda:1` beside it, on two.
"""

import math
import multiprocessing
import random
import select
import statistics
import time
from multiprocessing.connection import Connection as Pipe
from typing import Annotated, Any

import numpy as np
import torch
import typer

from dispec.bench.geometries import model_config
from dispec.bench.machine import describe_machine
from dispec.bench.report import Output, Plot, Report
from dispec.engine.transfer import shared_memory
from dispec.engine.transfer.interface import Pulled, RemoteBlocks, TransferOptions, Transport
from dispec.engine.transfer.nixl_transport import find_library
from dispec.engine.transfer.transfer_engine import TransferEngine
from dispec.layers.types import KVCache

TRANSPORTS: dict[str, tuple[Transport, ...]] = {"cpu": ("shm", "tcp", "nixl"), "cuda": ("cuda_ipc", "tcp", "nixl")}
TIMEOUT_SECONDS = 60


class Peer:
    """A transfer engine with a KV cache. Its memory has been written once: the first use of a page is not measured."""

    def __init__(
        self, name: str, device: str, transport: Transport, model: str, num_blocks: int, block_size: int
    ) -> None:
        config = model_config(model)
        keys = (config.num_layers, num_blocks, config.num_kv_heads, config.head_dim, block_size)
        values = (config.num_layers, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        size = 2 * torch.bfloat16.itemsize * math.prod(keys)
        self.shared = shared_memory.allocate(size) if device == "cpu" else None
        memory = self.shared.tensor if self.shared else torch.empty(size, dtype=torch.uint8, device=device)
        memory.fill_(len(name))
        halves = memory.view(torch.bfloat16).chunk(2)
        cache = KVCache(halves[0].view(keys), halves[1].view(values))
        self.block_bytes = size // num_blocks
        self.engine = TransferEngine(TransferOptions(name, transports=(transport,)))
        self.engine.register(cache, model, self.shared)

    def wait(self, transfer_id: str) -> None:
        """Wait until a pull is complete. Raises RuntimeError if it fails."""
        while True:
            if not select.select([self.engine.fileno()], [], [], TIMEOUT_SECONDS)[0]:
                raise RuntimeError(f"nothing came for {TIMEOUT_SECONDS} s")
            for event in self.engine.poll():
                if not isinstance(event, Pulled):
                    raise RuntimeError(str(event))
                if event.transfer_id == transfer_id:
                    return


def _serve(pipe: Pipe, arguments: tuple[Any, ...]) -> None:
    """Publish the transfers that come over the pipe: the source's process."""
    peer = Peer("source", *arguments)
    pipe.send(peer.engine.address)
    while (order := pipe.recv()) is not None:
        transfer_id, blocks = order
        peer.engine.publish(transfer_id, blocks, payload=b"")
        peer.engine.poll()
    peer.engine.close()


def measure(
    devices: tuple[str, str], transport: Transport, model: str, block_size: int, tokens: list[int], rounds: int
) -> dict[int, dict[str, list[float]]]:
    """Return the seconds of each round of "pull" and of "whole", by number of tokens.

    devices: of the source and of the puller.
    """
    num_blocks = 2 * -(-max(tokens) // block_size) + 1
    arguments = (transport, model, num_blocks, block_size)
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    source = context.Process(target=_serve, args=(other, (devices[0], *arguments)), daemon=True)
    source.start()
    puller = Peer("puller", devices[1], *arguments)
    host, port = pipe.recv()
    draw = random.Random(0)
    seconds: dict[int, dict[str, list[float]]] = {count: {"pull": [], "whole": []} for count in tokens}
    for round_ in range(rounds + 1):
        for count in tokens:
            size = -(-count // block_size)
            published, own = (draw.sample(range(1, num_blocks), size) for _ in range(2))
            for kind in ("pull", "whole"):
                name = f"{kind} {count} {round_}"
                if kind == "pull":  # checksums are computed in order: once a later transfer's are, so are these
                    pipe.send((name, published))
                    pipe.send((f"after {name}", []))
                    puller.engine.pull(RemoteBlocks("source", f"after {name}", host, port), 0, [])
                    puller.wait(f"after {name}")
                    puller.engine.release(f"after {name}")
                start = time.perf_counter()
                puller.engine.pull(RemoteBlocks("source", name, host, port), 0, own)
                if kind == "whole":
                    pipe.send((name, published))
                puller.wait(name)
                taken = time.perf_counter() - start
                puller.engine.release(name)
                if round_:  # the first one connects and maps memory
                    seconds[count][kind].append(taken)
    puller.engine.close()
    pipe.send(None)
    source.join()
    return seconds


def copy_seconds(num_bytes: int, rounds: int, devices: tuple[str, str]) -> float:
    """Return the median time of a plain copy, by one thread on a CPU."""
    source, target = (torch.ones(num_bytes, dtype=torch.uint8, device=device) for device in devices)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        if target.device.type == "cpu":
            np.copyto(target.numpy(), source.numpy())
        else:
            target.copy_(source)
            torch.cuda.synchronize(target.device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main(
    model: Annotated[str, typer.Option(help="Model with the KV geometry to use.")] = "qwen2.5-7b",
    tokens: Annotated[list[int], typer.Option(min=1)] = [512, 2048],  # noqa: B006
    transport: Annotated[
        list[str] | None, typer.Option(help="One of shm, tcp, nixl; with CUDA cuda_ipc, tcp, nixl.", show_default="all")
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the KV caches: cpu, cuda or cuda:N.")] = "cpu",
    source_device: Annotated[
        str | None, typer.Option(help="Device of the source's KV cache.", show_default="the same")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure the GB/s of KV blocks between two processes, by transport."""
    settings = dict(locals())
    devices = source_device or device, device
    kinds = {name.partition(":")[0] for name in devices}
    if len(kinds) > 1 or not kinds <= TRANSPORTS.keys():
        raise ValueError(f"devices are {' and '.join(devices)}, must both be one of {', '.join(TRANSPORTS)}")
    if "cuda" in kinds and not torch.cuda.is_available():
        raise ValueError(f"devices are {' and '.join(devices)}, but torch finds no CUDA device")
    known = TRANSPORTS[kinds.pop()]
    if unknown := set(transport or ()) - set(known):
        raise ValueError(f"transport has {', '.join(sorted(unknown))}, must be of {', '.join(known)}")
    columns = {
        "": "",
        "tokens": "d",
        "MB": ".1f",
        "pull ms": ".2f",
        "whole ms": ".2f",
        "pull GB/s": ".2f",
        "whole GB/s": ".2f",
    }
    columns |= {"copy GB/s": ".2f", "of copy": ".2f"}
    report = Report("disagg", settings, describe_machine(torch.device(device)), columns, output, plot)
    config = model_config(model)
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    for name in known:
        if transport and name not in transport:
            continue
        if name == "nixl" and find_library() is None:
            print("nixl is not installed: pip install 'dispec[nixl]'")
            continue
        for count, seconds in measure(devices, name, model, block_size, tokens, rounds).items():
            size = -(-count // block_size) * block_size * token_bytes
            rates = {kind: size / statistics.median(taken) for kind, taken in seconds.items()}
            copied = size / copy_seconds(size, rounds, devices)
            report.add(
                {"transport": name, "tokens": count},
                {"bytes": size, "seconds": seconds, "bytes_per_second": rates, "copy_bytes_per_second": copied},
                [name, count, size / 1e6]
                + [statistics.median(seconds[kind]) * 1e3 for kind in ("pull", "whole")]
                + [rate / 1e9 for rate in (rates["pull"], rates["whole"], copied)]
                + [rates["pull"] / copied],
            )
            report.point(name, f"{count} tokens", rates["pull"] / 1e9)
    report.finish(y="GB/s", kind="bars")


if __name__ == "__main__":
    typer.run(main)
