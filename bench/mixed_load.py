"""The effect of long prompts on running answers: one engine against separate ones, or servers beside each other.

    dispec bench mixed-load
    dispec bench mixed-load --num-streams 32 --prompt-tokens 8000 --rate 4 --num-prompts 24 \\
        --url dispec=http://127.0.0.1:8000 --url vllm=http://127.0.0.1:8001

Some streams generate all the time; meanwhile long prompts arrive as a Poisson process, each for a few tokens. The same
load is put on `dispec serve` and on `dispec serve --disaggregate`, in turns, on the same cores; or on servers that run.
"""

import asyncio
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import typer
import uvloop

from dispec.bench.contestants import ROOT
from dispec.bench.loading import Model
from dispec.bench.machine import describe_machine
from dispec.bench.openai_load import Answer, Client, Load, named_urls, run_load
from dispec.bench.report import Output, Plot, Report
from dispec.bench.serve import percentiles, served_model

_MOST_ANSWERS = 200  # of a stream


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


class Mixed(NamedTuple):
    """What a server answered: streams, and prompts that came meanwhile. Times are of `time.perf_counter`."""

    streams: list[Answer]
    prompts: list[Answer]

    def summarize(self) -> dict[str, Any]:
        """Return the figures of the time from the first prompt's arrival to the last one's first token.

        Raises ValueError if no stream or no prompt was answered in that time.
        """
        if all(answer.error is not None for answer in self.prompts):
            raise ValueError(f"no prompt was answered: {self.prompts[0].error}")
        begin = min(answer.arrival for answer in self.prompts)
        end = max(answer.chunks[0] for answer in self.prompts if answer.error is None)
        good = [answer for answer in self.streams if answer.error is None]
        gaps = [
            later - earlier
            for answer in good
            for earlier, later in zip(answer.chunks, answer.chunks[1:], strict=False)
            if begin <= earlier and later <= end
        ]
        if not gaps:
            raise ValueError("no stream generated while prompts were computed: take more prompts or a lower rate")
        tokens = sum(
            answer.num_tokens / len(answer.chunks) * sum(begin <= at <= end for at in answer.chunks) for answer in good
        )
        return {
            "itl": percentiles(gaps),
            "worst_gap": max(gaps),
            "ttft": percentiles([answer.ttft for answer in self.prompts if answer.error is None]),
            "tokens_per_second": tokens / (end - begin),
            "errors": sum(answer.error is not None for answer in (*self.streams, *self.prompts)),
        }


async def put(url: str, streams: Load, prompts: Load, seed: int) -> Mixed:
    """Put both loads on the server at once. Streams begin a little earlier, and none begins after the last prompt."""
    model = served_model(url, None)
    clients = Client(url), Client(url)
    warm = Load(2, prompts.prompt_tokens, 8, prompts.vocab_size, concurrency=2)
    await run_load(clients[0], warm, model, seed=-1 - seed)
    is_over = asyncio.Event()
    running = asyncio.create_task(run_load(clients[0], streams, model, seed, is_over=is_over.is_set))
    asked = await run_load(clients[1], prompts, model, seed)
    is_over.set()
    found = Mixed(await running, asked)
    for client in clients:
        client.close()
    return found


@contextmanager
def running(model: str, url: str | None, options: list[str]) -> Iterator[str]:
    """Yield the URL of a server that runs, or of one that is started with these options."""
    if url is not None:
        yield url
        return
    with running_server("--model", model, *options) as (_, started):
        yield started


def main(
    model: Model = "smollm2",
    url: Annotated[
        list[str] | None, typer.Option(help="Of a server that runs, or NAME=URL, in place of both; several take turns.")
    ] = None,
    num_streams: Annotated[int, typer.Option(min=1, help="That generate all the time.")] = 4,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each of their answers.")] = 256,
    num_prompts: Annotated[int, typer.Option(min=1)] = 12,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each long prompt.")] = 1500,
    rate: Annotated[float, typer.Option(help="Long prompts per second.")] = 0.3,
    vocab_size: Annotated[int, typer.Option(min=2, help="Prompts are of token ids below this.")] = 32000,
    prefill: Annotated[int, typer.Option(min=1)] = 1,
    decode: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Time between tokens while long prompts arrive, with one engine and with several, or of running servers."""
    settings = dict(locals())
    columns = {"": "", "itl p50 ms": ".1f", "p90": ".1f", "p99": ".1f", "worst": ".1f", "ttft p50 ms": ".0f"}
    columns |= {"p90 ": ".0f", "p99 ": ".0f", "streams tok/s": ".0f", "errors": "d"}
    report = Report("mixed-load", settings, describe_machine(), columns, output, plot)
    streams = Load(_MOST_ANSWERS * num_streams, 64, output_tokens, vocab_size, concurrency=num_streams)
    prompts = Load(num_prompts, prompt_tokens, 4, vocab_size, rate=rate)
    split = ["--disaggregate", "--num-prefill-workers", str(prefill), "--num-decode-workers", str(decode)]
    own: dict[str, tuple[str | None, list[str]]] = {"one engine": (None, []), f"{prefill} + {decode}": (None, split)}
    servers = {name: (address, []) for name, address in named_urls(url).items()} if url else own
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for seed in range(rounds):
        for name, (address, options) in servers.items():
            with running(str(model), address, options) as at:
                summary = uvloop.run(put(at, streams, prompts, seed)).summarize()
            found[name].append(summary)
            latencies = [summary["itl"]["p50"], summary["itl"]["p90"], summary["itl"]["p99"], summary["worst_gap"]]
            latencies += [summary["ttft"]["p50"], summary["ttft"]["p90"], summary["ttft"]["p99"]]
            cells = [name, *(1e3 * seconds for seconds in latencies), summary["tokens_per_second"], summary["errors"]]
            report.add({"engines": name, "seed": seed}, summary, cells)
    for name, summaries in found.items():
        report.point("p99", name, 1e3 * statistics.median(summary["itl"]["p99"] for summary in summaries))
    report.finish(y="ms between tokens", kind="bars")


if __name__ == "__main__":
    typer.run(main)
