"""`dispec bench`: the benchmarks by name. A benchmark's module is imported when that benchmark runs."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from dispec.serving.cli.console import reporting
from dispec.serving.cli.help_layout import HelpCommand, HelpGroup

COMMANDS = {
    "throughput": "tokens per second beside transformers, vLLM and llama.cpp",
    "formats": "tokens per second of quantised weights, beside llama.cpp's and vLLM's",
    "latency": "seconds to the first token and between tokens",
    "prefix": "time to first token with and without prefix sharing",
    "contention": "tokens per second beside busy processes, and in a server's first minute",
    "startup": "seconds to the first token of a fresh process, cold and warm cache",
    "memory": "resident memory of one long request, beside the peers'",
    "compare": "tokens per second of checkouts and of vLLM, in turn on one GPU",
    "plot": "a picture of compare's results",
    "dashboard": "pictures of the dashboard: idle, loaded, on a phone, engine dead",
    "ablations": "tokens per second as techniques are added one by one",
    "structured": "what grammars cost and forced tokens save, beside free text and vLLM",
    "grammar-engines": "llguidance beside xgrammar: compile times, masks, memory, correctness",
    "spec": "what speculative decoding is worth, and why",
    "compile": "compile times by phase; graphs, kernels, recompilations",
    "disagg": "GB/s of KV blocks from process to process, by transport",
    "cluster-sim": "latencies and goodput of a simulated cluster, and which workers to buy",
    "mixed-load": "time between tokens while long prompts arrive: one engine, or prompts elsewhere",
    "serve": "latencies and throughput of a server under load",
    "roofline": "steps as shares of the machine's measured limits",
    "linear": "a CPU's GEMMs with packed weights beside oneDNN's",
    "perplexity": "what weight and KV cache formats cost in quality, beside transformers",
    "agreement": "how often the next token is transformers' next token",
    "profile-step": "where the time of a decode step goes",
    "scheduler": "milliseconds of scheduling a step, without a model",
}


class _Benchmark(HelpCommand):
    """A benchmark that is known by its name; its module is imported for its options."""

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the imported command."""
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(cls=HelpCommand)(_reported(_benchmark(str(self.name))))
        return typer.main.get_command(app).make_context(info_name, args, parent, **extra)


class _Benchmarks(HelpGroup):
    def __init__(self, **settings: Any) -> None:
        commands = {name: _Benchmark(name, help=about) for name, about in COMMANDS.items()}
        super().__init__(**settings | {"commands": commands})


bench = typer.Typer(
    name="bench",
    cls=_Benchmarks,
    subcommand_metavar="BENCHMARK [OPTIONS]",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@bench.callback()
def _bench() -> None:
    """Measure throughput, latency, startup and more. `dispec bench BENCHMARK --help` has the options."""


def main(args: list[str]) -> Any:
    """Run a benchmark with its arguments and return its exit code."""
    return bench(args=args, prog_name="dispec bench", standalone_mode=False)


def _benchmark(name: str) -> Callable[..., None]:
    """Import a benchmark, which may load torch, and return its command."""
    main: Callable[..., None]
    match name:
        case "throughput":
            from dispec.bench.throughput import main
        case "formats":
            from dispec.bench.formats import main
        case "latency":
            from dispec.bench.latency import main
        case "prefix":
            from dispec.bench.prefix import main
        case "contention":
            from dispec.bench.contention import main
        case "startup":
            from dispec.bench.startup import main
        case "memory":
            from dispec.bench.memory import main
        case "compare":
            from dispec.bench.compare import main
        case "plot":
            from dispec.bench.plot import main
        case "dashboard":
            from dispec.bench.dashboard import main
        case "ablations":
            from dispec.bench.ablations import main
        case "structured":
            from dispec.bench.structured import main
        case "grammar-engines":
            from dispec.bench.grammar_engines import main
        case "spec":
            from dispec.bench.spec import main
        case "compile":
            from dispec.bench.compile import main
        case "disagg":
            from dispec.bench.disagg import main
        case "cluster-sim":
            from dispec.bench.cluster_sim import main
        case "mixed-load":
            from dispec.bench.mixed_load import main
        case "serve":
            from dispec.bench.serve import main
        case "roofline":
            from dispec.bench.roofline import main
        case "linear":
            from dispec.bench.linear import main
        case "perplexity":
            from dispec.bench.perplexity import main
        case "agreement":
            from dispec.bench.agreement import main
        case "profile-step":
            from dispec.bench.profile_step import main
        case "scheduler":
            from dispec.bench.scheduler import main
        case _:
            raise AssertionError(f"{name} is in COMMANDS and has no module here")
    return main


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with its errors reported in one sentence; DISPEC_DEBUG=1 adds the traceback."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        with reporting(quiet=True, debug=os.environ.get("DISPEC_DEBUG", "0") not in ("", "0")):
            command(**options)

    return run


if __name__ == "__main__":
    main(sys.argv[1:])
