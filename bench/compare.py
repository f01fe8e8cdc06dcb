"""Checkouts of DiSpec, and vLLM, in turn on one GPU: the same prompts at the same sizes.

    dispec bench compare --tree new=. --tree old=/tmp/old --vllm-path /tmp/vllm/site --output compare.jsonl
    dispec bench compare --tree new=. --tree old=/tmp/old --starts 2

Each contestant of a suite is a process of its own; all of them start at once, sleep, and take turns. Figures are
medians of the rounds; ratios are the first contestant's figure over the others'. A contestant that fails or does not
answer in time is left out from there on. With `--starts` the processes start one after another instead, in an empty
cache and then in a filled one, and what counts is the time until everything is compiled and recorded. Measure them
first, and give both runs the same `--cache`: then no contestant compiles and tunes kernels while others run.
"""

import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from dispec.bench.contestants import ROOT, ContestantFailed, Worker
from dispec.bench.geometries import geometry, model_config
from dispec.bench.loading import useful_kv_memory
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.report import Output, Report
from dispec.bench.workload import Workload

DTYPE = "bfloat16"
START_SECONDS = 270.0  # vLLM needs 80 alone, and more beside others that compile
ANSWER_SECONDS = 60.0


class Case(NamedTuple):
    """A workload. `decode_only` leaves the prompts' time out."""

    workload: Workload
    decode_only: bool = False

    @property
    def is_prefill(self) -> bool:
        return self.workload.output_tokens == 1 and not self.decode_only

    @property
    def counted_tokens(self) -> int:
        """Prompt tokens where one output token is asked for, else output tokens."""
        per_sequence = self.workload.prompt_tokens if self.is_prefill else self.workload.output_tokens
        return self.workload.concurrency * per_sequence

    def describe(self) -> str:
        kind = "prefill" if self.is_prefill else "decode" if self.decode_only else "whole"
        return f"{self.workload.concurrency} x {self.workload.prompt_tokens}, {kind}"


class Suite(NamedTuple):
    """Cases that one engine of each contestant serves."""

    model: str
    cases: tuple[Case, ...]

    @property
    def max_num_seqs(self) -> int:
        return max(case.workload.concurrency for case in self.cases)

    @property
    def max_model_len(self) -> int:
        return max(case.workload.tokens for case in self.cases) + 16

    @property
    def kv_bytes(self) -> int:
        return useful_kv_memory(model_config(self.model), self.max_num_seqs, self.max_model_len, 2)


SUITES = {
    "short": Suite("qwen2.5-1.5b", tuple(Case(Workload(size)) for size in (1, 6, 16, 32, 128))),
    "long": Suite(
        "qwen2.5-1.5b",
        (Case(Workload(1, 2048, 1)), Case(Workload(1, 8192, 1)), Case(Workload(8, 8192), decode_only=True)),
    ),
    "7b": Suite("qwen2.5-7b", (Case(Workload(1)), Case(Workload(32)))),
}

# Starts a contestant, with its compiled code in the given folder.
Start = Callable[[Path, float], Worker]


class Tree(NamedTuple):
    """A checkout of DiSpec."""

    name: str
    directory: Path

    def start(self, model: str, options: Mapping[str, Any], cache: Path, patience: float) -> Worker:
        settings = {"engine": "dispec", "model": model, "options": {"dtype": DTYPE, **options}}
        others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and Path(part) != ROOT]
        return Worker(
            self.name,
            [sys.executable, "-m", "dispec.bench.worker", json.dumps(settings)],
            _environment(cache) | {"PYTHONPATH": os.pathsep.join([str(self.directory), *others])},
            directory=self.directory,
            patience=patience,
        )


def start_vllm(python: str, site: Path, model: str, options: Mapping[str, Any], cache: Path, patience: float) -> Worker:
    """vLLM in one process, which is its fastest way to run offline; `site` is where its packages are."""
    folder = cache / model
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(geometry(model) | {"torch_dtype": DTYPE}))
    settings = {"model": str(folder), "load_format": "dummy", "dtype": DTYPE, **options}
    environment = _environment(cache) | {
        "PYTHONPATH": str(site),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    # -P: the names of this folder's files must not hide modules of its environment.
    command = [python, "-P", str(ROOT / "bench" / "vllm_worker.py"), json.dumps(settings)]
    return Worker("vllm", command, environment, patience=patience)


def _environment(cache: Path) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    return ours | {"DISPEC_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}


@contextlib.contextmanager
def started(starts: Mapping[str, Start], cache: Path, patience: float) -> Iterator[list[Worker]]:
    """The contestants that start, all at once; ends them afterwards."""
    running: list[Worker] = []

    def start(name: str) -> None:
        try:
            running.append(starts[name](cache / name, patience))
        except ContestantFailed as error:
            print(error, flush=True)

    with ThreadPoolExecutor(len(starts)) as threads:
        list(threads.map(start, starts))
    try:
        yield sorted(running, key=lambda worker: list(starts).index(worker.name))
    finally:
        with ThreadPoolExecutor(len(starts)) as threads:
            list(threads.map(Worker.close, running))


def take_turns(running: list[Worker], case: Case, vocab_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each contestant, after one round that warms up. Removes those that fail.

    Every round begins with another contestant, so that none always follows the same one.
    """
    seconds: dict[str, list[float]] = {worker.name: [] for worker in running}
    for round_ in range(rounds + 1):
        prompts = case.workload.prompts(vocab_size, seed=round_)
        first = round_ % max(1, len(running))
        for worker in running[first:] + running[:first]:
            try:
                taken = worker.run(case.workload, prompts, case.decode_only)
            except ContestantFailed as error:
                print(error, flush=True)
                running.remove(worker)
                worker.close()
                continue
            if round_ > 0:
                seconds[worker.name].append(taken)
    return seconds


def main(
    tree: Annotated[list[str], typer.Option(help="NAME=DIRECTORY of a checkout; the first one is compared.")],
    suites: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(SUITES)}.")] = ",".join(SUITES),
    starts: Annotated[int, typer.Option(min=0, help="Measure as many warm starts of the first suite.")] = 0,
    vllm_path: Annotated[Path | None, typer.Option(help="Directory of vLLM's packages.")] = None,
    vllm_python: Annotated[str, typer.Option(help="Python that runs vLLM.")] = sys.executable,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contestant; the median counts.")] = 3,
    minutes: Annotated[float, typer.Option(help="Begin no case after this long.")] = 9.0,
    cache: Annotated[
        Path | None, typer.Option(help="Keep compiled code here for a later run.", show_default="a temporary directory")
    ] = None,
    output: Output = None,
) -> None:
    """Tokens per second of checkouts of DiSpec and of vLLM, in turn on one GPU."""
    settings = dict(locals())
    end = time.monotonic() + 60 * minutes
    chosen = [SUITES[name.strip()] for name in suites.split(",")]
    trees = [Tree(name, Path(folder).resolve()) for name, folder in (given.split("=", 1) for given in tree)]
    names = [one.name for one in trees] + ["vllm"] * (vllm_path is not None)

    def all_starts(model: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Start]:
        def of(one: Tree) -> Start:
            return lambda cache, patience: one.start(model, ours, cache, patience)

        found = {one.name: of(one) for one in trees}
        if vllm_path is not None:
            found["vllm"] = lambda cache, patience: start_vllm(vllm_python, vllm_path, model, theirs, cache, patience)
        return found

    with tempfile.TemporaryDirectory(prefix="dispec-bench-compare-", ignore_cleanup_errors=True) as temporary:
        folder = (cache or Path(temporary)).absolute()
        machine = describe_machine(choose_device(None))
        if starts:
            columns = {"contestant": "", "cache": "", "ready s": ".1f", "first answer s": ".2f"}
            report = Report("compare-starts", settings, machine, columns, output)
            sizes = {"max_num_seqs": 64}
            servers = all_starts(
                chosen[0].model, sizes, sizes | {"max_model_len": 32768, "gpu_memory_utilization": 0.9}
            )
            measure_starts(report, servers, folder, starts, end, model_config(chosen[0].model).vocab_size)
        else:
            columns = {"model": "", "case": ""} | {f"{name} tok/s": ".1f" for name in names}
            columns |= {f"/ {name}": ".3fx" for name in names[1:]} | {"spread": ".1%"}
            report = Report("compare", settings, machine, columns, output)
            for suite in chosen:
                sizes = {"max_num_seqs": suite.max_num_seqs, "max_model_len": suite.max_model_len}
                ours = sizes | {"kv_cache_memory": suite.kv_bytes}
                theirs = sizes | {
                    "enable_prefix_caching": any(case.decode_only for case in suite.cases),
                    "gpu_memory_utilization": 0.3,
                    "kv_cache_memory_bytes": 2 * suite.kv_bytes,
                }
                contestants = all_starts(suite.model, ours, theirs)
                measure_suite(report, suite, contestants, folder, rounds, end)
        report.finish()


def measure_suite(
    report: Report, suite: Suite, contestants: Mapping[str, Start], cache: Path, rounds: int, end: float
) -> None:
    """Add a row to the report for each case that there is time for."""
    if end - time.monotonic() < 30:
        print(f"{suite.model}: no time left", flush=True)
        return
    names = list(contestants)
    with started(contestants, cache, min(START_SECONDS, end - time.monotonic())) as running:
        ready = ", ".join(f"{worker.name} {worker.start_seconds:.0f} s" for worker in running)
        print(f"{suite.model}: started beside each other: {ready}", flush=True)
        for worker in running:
            report.versions |= worker.versions
        for case in suite.cases:
            left = end - time.monotonic()
            if left < 5 or not running:
                print(f"{suite.model}, {case.describe()}: not measured", flush=True)
                continue
            for worker in running:
                worker.patience = min(ANSWER_SECONDS, left)
            seconds = take_turns(running, case, model_config(suite.model).vocab_size, rounds)
            rates = {
                name: case.counted_tokens / statistics.median(seconds[name]) if seconds.get(name) else None
                for name in names
            }
            first, *others = rates.values()
            ratios = [first / other if first and other else None for other in others]
            spread = max((max(taken) / min(taken) - 1 for taken in seconds.values() if taken), default=None)
            report.add(
                {"model": suite.model, **vars(case.workload), "decode_only": case.decode_only},
                {"tokens_per_second": rates, "ratio": dict(zip(names[1:], ratios, strict=True)), "seconds": seconds},
                [suite.model, case.describe(), *rates.values(), *ratios, spread],
            )
            shown = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items() if rate)
            print(f"{suite.model}, {case.describe()}: {shown} tok/s", flush=True)


def measure_starts(
    report: Report, contestants: Mapping[str, Start], cache: Path, num_warm: int, end: float, vocab_size: int
) -> None:
    """Start each contestant alone with a server's sizes: in an empty cache, then in the one that it filled."""
    workload = Workload(1, 128, 16)
    for kind in ["cold", *["warm"] * num_warm]:
        for name, start in contestants.items():
            left = end - time.monotonic()
            if left < 20:
                print(f"{name}, {kind}: no time left", flush=True)
                continue
            if kind == "cold":
                shutil.rmtree(cache / name, ignore_errors=True)
            try:
                worker = start(cache / name, min(START_SECONDS, left))
            except ContestantFailed as error:
                print(error, flush=True)
                continue
            try:
                first = worker.run(workload, workload.prompts(vocab_size), False)
            except ContestantFailed as error:
                print(error, flush=True)
                first = None
            finally:
                worker.close()
            ready = worker.start_seconds
            report.add(
                {"contestant": name, "cache": kind},
                {"ready_seconds": ready, "first_answer_seconds": first},
                [name, kind, ready, first],
            )
            print(f"{name}, {kind}: ready after {ready:.1f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
