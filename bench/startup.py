"""Seconds from the start of a process to the first generated token, with a cold and with a warm compile cache.

    dispec bench startup

Measures `dispec generate`, and `dispec serve` with a request as soon as it listens. Each start is a new process.
"""

import http.client
import json
import statistics
import subprocess
import sys
import time
from typing import Annotated, NamedTuple

import typer

from dispec.bench.compile_cache import fresh_cache
from dispec.bench.contestants import ROOT
from dispec.bench.loading import EnforceEager
from dispec.bench.machine import describe_machine
from dispec.bench.report import Output, Plot, Report
from dispec.bench.resident_memory import peak_bytes
from dispec.bench.serve_process import serving

PROMPT = "What is the capital of France?"
_COMMAND = [sys.executable, "-m", "dispec"]


class Start(NamedTuple):
    """Seconds from the start of a process to its first token and, for a server, until it was ready and compiled."""

    ready: float | None
    first_token: float
    peak_bytes: int
    compiled: float | None = None


def start_generate(options: list[str], environment: dict[str, str]) -> Start:
    """Start `dispec generate` and measure until the first byte of its output."""
    command = [*_COMMAND, "generate", PROMPT, "--max-tokens", "16", "--ignore-eos", "--quiet", *options]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - began
        peak = peak_bytes(process.pid)
        process.stdout.read()
    if not first or process.returncode != 0:
        raise RuntimeError(f"dispec generate ended with code {process.returncode}")
    return Start(None, seconds, peak)


def start_serve(options: list[str], environment: dict[str, str]) -> Start:
    """Start `dispec serve` and measure until the first chunk of a streamed completion."""
    began = time.perf_counter()
    with serving(options, environment) as server:
        ready = time.perf_counter() - began
        body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "stream": True, "ignore_eos": True}
        connection = http.client.HTTPConnection(server.address, timeout=600)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        for line in response:
            if line.startswith(b"data:") and b'"text"' in line:
                break
        else:
            raise RuntimeError(f"dispec serve answered {response.status} without a token")
        first_token = time.perf_counter() - began
        peak = peak_bytes(server.pid)
        response.read()
        compiled = began_compiled(connection, began)
        connection.close()
    return Start(ready, first_token, peak, compiled)


def began_compiled(connection: http.client.HTTPConnection, began: float, patience: float = 300) -> float | None:
    """Return the seconds until an idle server runs compiled steps; None if it compiles nothing or fails to."""
    while time.perf_counter() - began < patience:
        connection.request("GET", "/server_info")
        info = json.loads(connection.getresponse().read())
        if info["is_compiled"]:
            return time.perf_counter() - began
        if info["compile"] == "off":
            return None
        time.sleep(0.2)
    return None


def main(
    model: Annotated[str, typer.Option(help="Directory, hub id, .gguf file or built-in name.")] = "smollm2",
    cold_starts: Annotated[int, typer.Option(min=0, help="Each in a new cache.")] = 1,
    warm_starts: Annotated[int, typer.Option(min=0, help="In the cache that a cold start filled.")] = 3,
    enforce_eager: EnforceEager = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Seconds to the first token of a fresh process, with a cold and a warm cache."""
    settings = dict(locals())
    columns = {
        "command": "",
        "cache": "",
        "ready s": ".2f",
        "first token s": ".2f",
        "compiled s": ".1f",
        "peak MiB": ".0f",
    }
    report = Report("startup", settings, describe_machine(), columns, output, plot)
    options = ["--model", model, *(["--enforce-eager"] if enforce_eager else [])]
    for name, start in (("generate", start_generate), ("serve", start_serve)):
        found: dict[str, list[Start]] = {"cold": [], "warm": []}
        for _ in range(cold_starts):
            with fresh_cache() as environment:
                found["cold"].append(start(options, environment))
        if warm_starts:
            with fresh_cache() as environment:
                start(options, environment)  # fills it: a server is asked until it is compiled
                found["warm"] = [start(options, environment) for _ in range(warm_starts)]
        for cache, starts in found.items():
            if not starts:
                continue
            first = statistics.median(start_.first_token for start_ in starts)
            ready = None if starts[0].ready is None else statistics.median(start_.ready or 0.0 for start_ in starts)
            peak = max(start_.peak_bytes for start_ in starts)
            known = [start_.compiled for start_ in starts if start_.compiled is not None]
            compiled = statistics.median(known) if known else None
            report.add(
                {"command": name, "cache": cache},
                {
                    "first_token_seconds": first,
                    "ready_seconds": ready,
                    "compiled_seconds": compiled,
                    "peak_bytes": peak,
                    "seconds": [start_.first_token for start_ in starts],
                },
                [f"dispec {name}", cache, ready, first, compiled, peak / 2**20],
            )
            report.point("", f"{name}, {cache} cache", first)
    report.finish(y="seconds to the first token", kind="bars")


if __name__ == "__main__":
    typer.run(main)
