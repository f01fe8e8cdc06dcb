"""Tokens per second beside busy processes, and in a server's first minute.

    dispec bench contention

Decoding: one sequence, alternately alone and beside one busy process for each usable core. The fair share of two
threads beside two busy ones is a half. First minute: `dispec serve` with a cold and with a warm cache; streams follow
one another from the moment that it listens, and tokens are counted in spans of five seconds.
"""

import http.client
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated
from urllib.parse import urlsplit

import typer

from dispec.bench.compile_cache import fresh_cache
from dispec.bench.loading import Dtype, Model, load
from dispec.bench.machine import describe_machine
from dispec.bench.mixed_load import running_server
from dispec.bench.report import Output, Plot, Report
from dispec.bench.serve import served_model
from dispec.engine.api.llm import LLM
from dispec.engine.machine.cpu_cores import usable_cores
from dispec.engine.sampling_params import SamplingParams

SPAN_SECONDS = 5.0
_STREAM_TOKENS = 512


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run `count` busy processes in this process's session, since schedulers weigh sessions against each other."""
    processes = [
        subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def decode_rate(llm: LLM, tokens: int) -> float:
    """Return the tokens per second of one sequence."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    llm.generate([[1, 2, 3, 4]], params)
    return tokens / (time.perf_counter() - start)


def token_times(url: str, model: str, seconds: float) -> list[float]:
    """Run streams one after another for `seconds`; return each token's arrival, in seconds since the first request."""
    address = urlsplit(url)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=600)
    body = {"model": model, "prompt": "Once", "max_tokens": _STREAM_TOKENS, "temperature": 0, "stream": True}
    times: list[float] = []
    began = time.perf_counter()
    while not times or times[-1] < seconds:
        request = json.dumps(body | {"ignore_eos": True})
        connection.request("POST", "/v1/completions", request, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"the server answers {response.status}: {response.read()[:200]!r}")
        for line in response:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - began)
    connection.close()
    return times


def spans(times: list[float], seconds: float) -> list[float]:
    """Return the tokens per second of each span; the first span includes the time to the first token."""
    count = max(1, round(seconds / SPAN_SECONDS))
    counts = [0] * count
    for moment in times:
        if moment < count * SPAN_SECONDS:
            counts[int(moment / SPAN_SECONDS)] += 1
    return [tokens / SPAN_SECONDS for tokens in counts]


def main(
    model: Model = "smollm2",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a measured answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating quiet and loaded runs.")] = 5,
    busy: Annotated[int | None, typer.Option(min=1, help="Busy processes.", show_default="the usable cores")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of a server's life to measure; 0 skips it.")] = 60,
    dtype: Dtype = "bfloat16",
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure tokens per second beside busy processes, and in a server's first minute."""
    settings = dict(locals())
    columns = {"": "", "tokens/s": ".1f", "of quiet": ".2fx", "slowest, fastest": " ", "longest gap s": ".2f"}
    report = Report("contention", settings, describe_machine(), columns, output, plot)
    count = busy or usable_cores()
    llm = load(model, dtype=dtype, device="cpu", max_num_seqs=1, max_model_len=tokens + 16)
    rates: dict[str, list[float]] = {"quiet": [], f"{count} busy": []}
    decode_rate(llm, tokens)
    for _ in range(rounds):
        for name, others in zip(rates, (0, count), strict=True):
            with busy_processes(others):
                rates[name].append(decode_rate(llm, tokens))
    quiet = statistics.median(rates["quiet"])
    for name, found in rates.items():
        rate = statistics.median(found)
        report.add(
            {"neighbours": name},
            {"tokens_per_second": found},
            [f"decoding, {name}", rate, rate / quiet, f"{min(found):.1f}, {max(found):.1f}", None],
        )
        report.point("decoding", name, rate)
    llm.close()
    del llm
    if seconds:
        with fresh_cache() as environment:
            for cache in ("cold", "warm"):
                with running_server("--model", model, "--dtype", dtype, environment=environment) as (_, url):
                    times = token_times(url, served_model(url, None), seconds)
                found = spans(times, seconds)
                gap = max(later - earlier for earlier, later in itertools.pairwise(times))
                for index, rate in enumerate(found):
                    name = f"server, {cache}, {index * SPAN_SECONDS:.0f} to {(index + 1) * SPAN_SECONDS:.0f} s"
                    report.add(
                        {"cache": cache, "second": index * SPAN_SECONDS},
                        {"tokens_per_second": rate},
                        [name, rate, None, None, gap if index == 0 else None],
                    )
                    report.point(f"server, {cache} cache", index * SPAN_SECONDS, rate)
    report.finish(y="tokens/s", kind="bars")


if __name__ == "__main__":
    typer.run(main)
