"""Time in which a prompt computed by one engine becomes ready to generate in another, by transport.

    python -m dispec.bench.handover --device cuda:1 --prefill-device cuda:0

Two processes have engines with random weights. One computes a prompt, the other receives its keys and values and goes
on. "handover" is the time from the end of the step that computes the first token in the first engine until the second
one has that token and the blocks. "alone" is the time to the first token in one engine, "ttft" that through both.
"busy" has the first engine begin another prompt behind each one: its step is under way while the blocks are sent.
"""

import multiprocessing
import random
import select
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe
from typing import Annotated, Any

import torch
import typer

from dispec.bench.geometries import model_config
from dispec.bench.machine import describe_machine
from dispec.bench.report import Output, Report
from dispec.engine.engine import Engine
from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.transfer.interface import RemoteBlocks

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
STEP_TOKENS = 2048
KINDS = ("idle", "busy")


def make_engine(model: str, device: str, transport: Any, longest: int) -> Engine:
    return Engine(
        EngineOptions(
            model_config(model),
            device=device,
            load_format="dummy",
            kv_transfer=transport,
            compile="off",
            kv_cache_memory="2GiB" if device.startswith("cuda") else "256MiB",
            max_model_len=longest + STEP_TOKENS,
            max_num_batched_tokens=STEP_TOKENS,
            enable_prefix_caching=False,
            max_num_seqs=4,
        )
    )


def _prefill(pipe: Pipe, arguments: tuple[Any, ...]) -> None:
    """Compute the prompts that come over the pipe, and send the time of each one's first token."""
    engine = make_engine(*arguments)
    pipe.send(engine.transfer_address())
    while True:
        if not engine.has_work:
            select.select([pipe.fileno(), *engine.wake_ups], [], [])
        if pipe.poll():
            order = pipe.recv()
            if order is None:
                break
            name, prompt, other = order
            engine.add(prompt, PARAMS, publish_as=name, request_id=name)
            if other:
                engine.add(other, SamplingParams(temperature=0, max_tokens=1))
        engine.work_while_idle()
        if engine.has_work and any(output.request_id == name for output in engine.step()):
            pipe.send(time.perf_counter())
    engine.close()


def first_token(engine: Engine) -> float:
    """Run an engine until its request ends, and return the time of its first token, received or computed."""
    found = None
    while engine.has_work or found is None:
        if not engine.has_work:
            select.select(engine.wake_ups, [], [])
        engine.work_while_idle()
        if engine.kv_connector.has_outputs:
            found = found or time.perf_counter()
        if engine.has_work and engine.step():
            found = found or time.perf_counter()
    return found


def measure(
    pipe: Pipe, engine: Engine, lengths: list[int], rounds: int
) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """Yield the seconds of each round for each number of prompt tokens."""
    address = pipe.recv()
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(1000) for _ in range(length)]

    for length in lengths:
        seconds: dict[str, list[float]] = {"alone": []}
        for round_ in range(rounds + 1):
            start = time.perf_counter()
            engine.add(prompt(length), PARAMS)
            taken = {"alone": first_token(engine) - start}
            for kind in KINDS:
                name, tokens = f"{kind} {length} {round_}", prompt(length)
                remote = RemoteBlocks(address["engine_id"], name, address["transfer_host"], address["transfer_port"])
                start = time.perf_counter()
                pipe.send((name, tokens, prompt(STEP_TOKENS) if kind == "busy" else None))
                engine.add(tokens, PARAMS, pull=remote)
                end = first_token(engine)
                taken |= {f"{kind} ttft": end - start, f"{kind} handover": end - pipe.recv()}
            if round_:  # the first one connects and maps memory
                for name, value in taken.items():
                    seconds.setdefault(name, []).append(value)
        yield length, seconds


def main(
    model: Annotated[str, typer.Option(help="Geometry of the model.")] = "qwen2.5-1.5b",
    prompt_tokens: Annotated[list[int], typer.Option(min=1)] = [512, 2048],  # noqa: B006
    transport: Annotated[list[str], typer.Option(help="As --kv-transfer.")] = ["auto", "tcp"],  # noqa: B006
    device: Annotated[str, typer.Option(help="Device of the engine that generates.")] = "cpu",
    prefill_device: Annotated[
        str | None, typer.Option(help="Device of the engine that computes prompts.", show_default="the same")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    output: Output = None,
) -> None:
    """Measure the time in which a prompt goes from one engine to another, by transport."""
    columns = {"": "", "tokens": "d", "alone ms": ".2f"}
    columns |= {f"{kind} {what} ms": ".2f" for kind in KINDS for what in ("ttft", "handover")}
    report = Report("handover", dict(locals()), describe_machine(torch.device(device)), columns, output, None)
    context = multiprocessing.get_context("spawn")
    for name in transport:
        pipe, other = context.Pipe()
        sizes = name, max(prompt_tokens)
        arguments = (other, (model, prefill_device or device, *sizes))
        process = context.Process(target=_prefill, args=arguments, daemon=True)
        process.start()
        engine = make_engine(model, device, *sizes)
        for length, seconds in measure(pipe, engine, prompt_tokens, rounds):
            medians = [1e3 * statistics.median(taken) for taken in seconds.values()]
            report.add({"transport": name, "tokens": length}, {"seconds": seconds}, [name, length, *medians])
        pipe.send(None)
        engine.close()
        process.join()
    report.finish(y="ms", kind="bars")


if __name__ == "__main__":
    typer.run(main)
