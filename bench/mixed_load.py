"""The effect of long prompts on running answers: one engine against separate prefill and decode engines.

    dispec bench mixed-load

Some streams generate all the time; meanwhile long prompts arrive as a Poisson process, each for a few tokens. The same
load is put on `dispec serve` and on `dispec serve --disaggregate`, in turns, on the same cores.
"""

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
import uvloop

from dispec.bench.contestants import ROOT
from dispec.bench.loading import Model
from dispec.bench.machine import describe_machine
from dispec.bench.openai_load import Answer, Client, Load, run_load
from dispec.bench.report import Output, Plot, Report
from dispec.bench.serve import percentiles, served_model

_VOCABULARY = 32000  # prompts are of token ids below this


def ready_url(process: "subprocess.Popen[str]") -> str:
    """Return the URL that a server prints when it is ready. Raises RuntimeError if it ends before."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"API\s+(http\S+)/v1", line):
            return found.group(1)
    raise RuntimeError(f"dispec serve ended with code {process.wait()}")


@contextmanager
def running_server(
    *options: str, environment: dict[str, str] | None = None
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Start a server; yield its process and its URL when it is ready."""
    command = [sys.executable, "-m", "dispec", "serve", "--port", "0", *options]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield process, ready_url(process)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


async def load(url: str, streams: Load, prompts: Load, seed: int) -> tuple[list[Answer], list[Answer]]:
    """Put both loads on the server at once."""
    model = served_model(url, None)
    clients = Client(url), Client(url)
    warm = Load(2, 64, 8, _VOCABULARY, concurrency=2)
    await run_load(clients[0], warm, model, seed=-1)
    found = await asyncio.gather(
        *(run_load(c, one, model, seed) for c, one in zip(clients, (streams, prompts), strict=True))
    )
    for client in clients:
        client.close()
    return found[0], found[1]


def main(
    model: Model = "smollm2",
    num_streams: Annotated[int, typer.Option(min=1, help="That generate all the time.")] = 4,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each of their answers.")] = 256,
    num_prompts: Annotated[int, typer.Option(min=1)] = 12,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each long prompt.")] = 1500,
    rate: Annotated[float, typer.Option(help="Long prompts per second.")] = 0.3,
    prefill: Annotated[int, typer.Option(min=1)] = 1,
    decode: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Time between tokens while long prompts arrive, with one engine and with several."""
    settings = dict(locals())
    columns = {"": "", "itl p50 ms": ".0f", "p90": ".0f", "p99": ".0f", "worst": ".0f", "ttft p50 s": ".2f"}
    columns |= {"ttft p90 s": ".2f", "tok/s": ".0f", "errors": "d"}
    report = Report("mixed-load", settings, describe_machine(), columns, output, plot)
    streams = Load(2 * num_streams, 64, output_tokens, _VOCABULARY, concurrency=num_streams)
    prompts = Load(num_prompts, prompt_tokens, 4, _VOCABULARY, rate=rate)
    kinds = {
        "one engine": ["--model", str(model)],
        f"{prefill} + {decode}": [
            "--model",
            str(model),
            "--disaggregate",
            "--num-prefill-workers",
            str(prefill),
            "--num-decode-workers",
            str(decode),
        ],
    }
    found: dict[str, tuple[list[Answer], list[Answer]]] = {kind: ([], []) for kind in kinds}
    for seed in range(rounds):
        for kind, options in kinds.items():
            with running_server(*options) as (_, url):
                generated, asked = uvloop.run(load(url, streams, prompts, seed))
            found[kind][0].extend(generated)
            found[kind][1].extend(asked)
    for kind, (generated, asked) in found.items():
        good = [answer for answer in generated if answer.error is None]
        gaps = [gap for answer in good for gap in answer.gaps]
        itl = percentiles(gaps) or {}
        ttft = percentiles([answer.ttft for answer in asked if answer.error is None]) or {}
        tokens = sum(answer.num_tokens for answer in good) / sum(answer.e2e for answer in good) * num_streams
        errors = sum(answer.error is not None for answer in (*generated, *asked))
        cells = [kind, *(1e3 * itl[name] for name in ("p50", "p90", "p99")), 1e3 * max(gaps), ttft["p50"], ttft["p90"]]
        figures = {"itl": itl, "worst_gap": max(gaps), "ttft": ttft, "tokens_per_second": tokens, "errors": errors}
        report.add({"engines": kind}, figures, [*cells, tokens, errors])
        report.point("p99", kind, 1e3 * itl["p99"])
    report.finish(y="ms between tokens", kind="bars")


if __name__ == "__main__":
    typer.run(main)
