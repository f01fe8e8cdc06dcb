"""Checkouts of DiSpec, and vLLM, in turn on the same GPUs: the same prompts at the same sizes.

    dispec bench compare --tree new=. --tree old=/tmp/old --vllm-path /tmp/vllm/site --output compare.jsonl
    dispec bench compare --tree new=. --tree old=/tmp/old --starts 2

Each contestant of a suite is a process of its own. All start at once, sleep, and take turns. Figures are medians of the
rounds; ratios are the first contestant's figure over the others'. A contestant that fails or does not answer in time is
left out from there on. With `--starts` the processes start one after another instead, in an empty cache and then in a
filled one, and the figure is the time until everything is compiled and recorded. Measure starts first, and give both
runs the same `--cache`: then no contestant compiles kernels while others run.
"""

import functools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from dispec.bench.checkouts import Tree, cached_in
from dispec.bench.contestants import ContestantFailed, Worker, started
from dispec.bench.geometries import model_config
from dispec.bench.loading import useful_kv_memory
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.report import Output, Report
from dispec.bench.vllm_peer import VLLM, VllmPath, memory_on_cuda
from dispec.bench.workload import Workload

START_SECONDS = 270.0  # vLLM needs 80 alone, and more beside others that compile
ANSWER_SECONDS = 60.0

# Starts a contestant. Arguments: folder for its compiled code, and seconds to wait for each answer.
Start = Callable[[Path, float], Worker]


class Case(NamedTuple):
    """A workload. decode_only: leave out the time of the prompts."""

    workload: Workload
    decode_only: bool = False

    @property
    def is_prefill(self) -> bool:
        return self.workload.output_tokens == 1 and not self.decode_only

    @property
    def counted_tokens(self) -> int:
        """Prompt tokens of a prefill, else output tokens."""
        per_sequence = self.workload.prompt_tokens if self.is_prefill else self.workload.output_tokens
        return self.workload.concurrency * per_sequence

    def describe(self) -> str:
        kind = "prefill" if self.is_prefill else "decode" if self.decode_only else "whole"
        return f"{self.workload.concurrency} x {self.workload.prompt_tokens}, {kind}"


class Suite(NamedTuple):
    """Cases that one engine of each contestant serves in turn."""

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
        """Return the bytes that the keys and values of the largest case take."""
        config = model_config(self.model)
        sizes = [(case.workload.concurrency, case.workload.tokens + 16) for case in self.cases]
        return max(useful_kv_memory(config, *size, dtype_bytes=2) for size in sizes)


SUITES = {
    "1.5b": Suite(
        "qwen2.5-1.5b",
        (
            *(Case(Workload(size)) for size in (1, 6, 16, 32, 128)),
            *(Case(Workload(1, tokens, 1)) for tokens in (2048, 8192, 32000)),
            *(Case(Workload(size, tokens), decode_only=True) for size, tokens in ((1, 8192), (8, 8192), (1, 32000))),
        ),
    ),
    "7b": Suite("qwen2.5-7b", (Case(Workload(1)), Case(Workload(32)))),
}


def take_turns(running: list[Worker], case: Case, vocab_size: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round of each contestant, after one warm-up round; remove contestants that fail.

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


class Contestants(NamedTuple):
    """The checkouts, of which the first is compared with the others, and vLLM."""

    trees: list[Tree]
    vllm: VLLM | None

    def starts(self, model: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Start]:
        """Return a function for each contestant that starts it. ours, theirs: options of DiSpec and of vLLM."""
        found: dict[str, Start] = {tree.name: functools.partial(tree.start, model, ours) for tree in self.trees}
        vllm = self.vllm
        if vllm is not None:

            def start(cache: Path, patience: float) -> Worker:
                environment = cached_in(cache)
                return vllm.start(
                    model, theirs, cache / model, is_cuda=True, environment=environment, patience=patience
                )

            found["vllm"] = start
        return found


def main(
    tree: Annotated[list[str], typer.Option(help="NAME=DIRECTORY of a checkout; the first one is compared.")],
    suites: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(SUITES)}.")] = ",".join(SUITES),
    starts: Annotated[int, typer.Option(min=0, help="Measure as many warm starts of the first suite.")] = 0,
    vllm_path: VllmPath = None,
    vllm_python: Annotated[str, typer.Option(help="Python that runs vLLM.", show_default="this one")] = sys.executable,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contestant; the median counts.")] = 3,
    minutes: Annotated[float, typer.Option(help="Begin no case after this long.")] = 9.0,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs of each contestant.")] = 1,
    cache: Annotated[
        Path | None, typer.Option(help="Keep compiled code here for a later run.", show_default="a temporary directory")
    ] = None,
    output: Output = None,
) -> None:
    """Compare tokens per second of checkouts of DiSpec and of vLLM, in turn on the same GPUs."""
    settings = dict(locals())
    end = time.monotonic() + 60 * minutes
    suite_names = [name.strip() for name in suites.split(",")]
    if unknown := [name for name in suite_names if name not in SUITES]:
        raise ValueError(f"--suites has {', '.join(unknown)}, must be of {', '.join(SUITES)}")
    chosen = [SUITES[name] for name in suite_names]
    trees = [Tree(name, Path(folder).resolve()) for name, folder in (given.split("=", 1) for given in tree)]
    contestants = Contestants(trees, None if vllm_path is None else VLLM(vllm_python, vllm_path.absolute()))
    names = list(contestants.starts("", {}, {}))
    machine = describe_machine(choose_device(None))
    with tempfile.TemporaryDirectory(prefix="dispec-bench-compare-", ignore_cleanup_errors=True) as temporary:
        folder = (cache or Path(temporary)).absolute()
        if starts:
            columns = {"contestant": "", "cache": "", "ready s": ".1f", "first answer s": ".2f"}
            report = Report("compare-starts", settings, machine, columns, output)
            measure_starts(report, chosen[0], contestants, folder, starts, end)
        else:
            columns = {"model": "", "case": ""} | {f"{name} tok/s": ".1f" for name in names}
            columns |= {f"/ {name}": ".3fx" for name in names[1:]} | {"spread": ".1%"}
            report = Report("compare", settings, machine, columns, output)
            for suite in chosen:
                measure_suite(report, suite, contestants, folder, tensor_parallel_size, rounds, end)
        report.finish()


def measure_suite(
    report: Report, suite: Suite, contestants: Contestants, cache: Path, num_gpus: int, rounds: int, end: float
) -> None:
    """Add a row to the report for each case until `end`, in seconds of the monotonic clock."""
    if end - time.monotonic() < 30:
        print(f"{suite.model}: no time left", flush=True)
        return
    sizes = {"max_num_seqs": suite.max_num_seqs, "max_model_len": suite.max_model_len}
    sizes |= {"tensor_parallel_size": num_gpus}
    ours = sizes | {"kv_cache_memory": suite.kv_bytes}
    theirs = sizes | {"enable_prefix_caching": any(case.decode_only for case in suite.cases)}
    theirs |= memory_on_cuda(suite.kv_bytes)
    starts = contestants.starts(suite.model, ours, theirs)
    patience = min(START_SECONDS, end - time.monotonic())
    print(f"{suite.model}: all start beside each other", flush=True)
    with started({name: functools.partial(start, cache / name, patience) for name, start in starts.items()}) as running:
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
            add_case(report, suite, case, {name: seconds.get(name, []) for name in starts})


def add_case(report: Report, suite: Suite, case: Case, seconds: Mapping[str, list[float]]) -> None:
    """Add a row with each contestant's rate, and with the first one's rate over each of the others'."""
    rates = {name: case.counted_tokens / statistics.median(taken) if taken else None for name, taken in seconds.items()}
    first, *others = rates.values()
    ratios = [first / other if first and other else None for other in others]
    spread = max((max(taken) / min(taken) - 1 for taken in seconds.values() if taken), default=None)
    report.add(
        {"model": suite.model, **vars(case.workload), "decode_only": case.decode_only},
        {
            "tokens_per_second": rates,
            "ratio": dict(zip(list(rates)[1:], ratios, strict=True)),
            "seconds": {name: taken for name, taken in seconds.items() if taken},
        },
        [suite.model, case.describe(), *rates.values(), *ratios, spread],
    )
    shown = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items() if rate)
    print(f"{suite.model}, {case.describe()}: {shown} tok/s", flush=True)


def measure_starts(
    report: Report, suite: Suite, contestants: Contestants, cache: Path, num_warm: int, end: float
) -> None:
    """Start each contestant alone with a server's sizes: in an empty cache, then in the one that it filled."""
    workload, vocab_size = Workload(1, 128, 16), model_config(suite.model).vocab_size
    ours = {"max_num_seqs": 64}
    starts = contestants.starts(suite.model, ours, ours | {"max_model_len": 32768, "gpu_memory_utilization": 0.9})
    for kind in ["cold", *["warm"] * num_warm]:
        for name, start in starts.items():
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
