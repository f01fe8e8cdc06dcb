"""`dispec bench`: the benchmarks by name. A benchmark's module is loaded only when it is asked for."""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from dispec.serving.cli.console import reporting

COMMANDS = {
    "throughput": "tokens per second beside transformers, vLLM and llama.cpp",
    "latency": "seconds to the first token and between tokens",
    "prefix": "time to first token with and without prefix sharing",
    "contention": "tokens per second beside busy processes, and in a server's first minute",
    "startup": "seconds to the first token of a fresh process, cold and warm cache",
    "memory": "resident memory of one long request, beside the peers'",
    "compare": "tokens per second of checkouts and of vLLM, in turn on one GPU",
    "ablations": "tokens per second as techniques are added one by one",
    "spec": "what speculative decoding is worth, and why",
    "compile": "compile times by phase; graphs, kernels, recompilations",
    "disagg": "GB/s of KV blocks from process to process, by transport",
    "cluster-sim": "latencies and goodput of a simulated cluster, and which workers to buy",
    "mixed-load": "time between tokens while long prompts arrive: one engine, or prompts elsewhere",
    "serve": "latencies and throughput of a server under load",
    "roofline": "steps as shares of the machine's measured limits",
    "agreement": "how often the next token is transformers' next token",
    "profile-step": "where the time of a decode step goes",
    "scheduler": "milliseconds of scheduling a step, without a model",
}


def overview() -> str:
    """What there is."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(["Usage: dispec bench BENCHMARK [OPTIONS]", "", *lines, "", "dispec bench BENCHMARK --help"])


def main(args: list[str]) -> Any:
    """Run a benchmark with its arguments. Raises typer.BadParameter for what it cannot read, typer.Exit on errors."""
    if not args or args[0] in ("--help", "-h"):
        print(overview())
        return None
    name, *rest = args
    if name not in COMMANDS:
        raise typer.BadParameter(f"there is no benchmark {name!r}, must be one of {', '.join(COMMANDS)}")
    module = importlib.import_module(f"dispec.bench.{name.replace('-', '_')}")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(_reported(module.main))
    return app(args=rest, prog_name=f"dispec bench {name}", standalone_mode=False)


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its errors told in a sentence; DISPEC_DEBUG=1 shows where one came from."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        with reporting(quiet=True, debug=os.environ.get("DISPEC_DEBUG", "0") not in ("", "0")):
            command(**options)

    return run


if __name__ == "__main__":
    main(sys.argv[1:])
