"""Engines that take turns on the same workload, each in a process of its own that sleeps between its turns."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dispec.bench.llama_cpp import parse_batched_bench
from dispec.bench.resident_memory import cpu_seconds, peak_bytes
from dispec.bench.workload import Workload
from dispec.engine import SPIN_COUNT

ROOT = Path(__file__).resolve().parent.parent


def peer_environment() -> dict[str, str]:
    """Return this process's variables without those that `import dispec` set: peers run with their own defaults."""
    environment = dict(os.environ)
    if environment.get("GOMP_SPINCOUNT") == SPIN_COUNT:
        del environment["GOMP_SPINCOUNT"]
    return environment


class ContestantFailed(RuntimeError):
    """A contestant's process ended or returned a wrong result; the message ends with its last output."""


class Contestant(Protocol):
    """An engine under measurement.

    name: in tables. versions: of its packages. peak_bytes: peak resident memory of its processes.
    start_seconds: from process start until it is ready. cpu: CPU seconds of its processes.
    """

    name: str
    versions: dict[str, str]
    start_seconds: float | None
    peak_bytes: int

    def run(self, workload: Workload, prompts: list[list[int]], decode_only: bool) -> float: ...
    def cpu(self) -> float: ...
    def close(self) -> None: ...


Started = TypeVar("Started", bound=Contestant)


class Worker:
    """A process that loads once and runs one workload a request, over the protocol of `bench.worker`.

    directory: working directory of the process. patience: seconds to wait for each answer, the first included, before
    the process is killed; None waits without limit.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str] | None = None,
        *,
        directory: Path = ROOT,
        patience: float | None = None,
    ) -> None:
        self.name = name
        self.patience = patience
        self.peak_bytes = 0
        self._log = tempfile.NamedTemporaryFile(prefix=f"dispec-bench-{name.replace(' ', '-')}-", suffix=".log")  # noqa: SIM115
        start = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.versions: dict[str, str] = self._read()["ready"]
        except BaseException:
            self.close()
            raise
        self.start_seconds: float | None = time.perf_counter() - start

    def run(self, workload: Workload, prompts: list[list[int]], decode_only: bool) -> float:
        """Run the workload and return its seconds. Raises ContestantFailed if the result is not what was requested."""
        answer = self.generate(prompts, workload.output_tokens, decode_only)
        if answer["output_tokens"] != [workload.output_tokens] * len(prompts):
            raise ContestantFailed(
                f"{self.name} made {answer['output_tokens']} tokens, not {workload.output_tokens} each"
            )
        cached, computed = answer["cached_tokens"], workload.concurrency * workload.prompt_tokens
        # The last block of a prompt is recomputed; blocks have at most 128 tokens.
        if decode_only and cached is not None and cached < computed - 128 * workload.concurrency:
            raise ContestantFailed(
                f"{self.name} found {cached} of {computed} prompt tokens in its cache: it is too small"
            )
        return float(answer["seconds"])

    def generate(
        self,
        prompts: list[list[int]],
        output_tokens: int,
        decode_only: bool = False,
        params: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the answer of the process: seconds, output_tokens, cached_tokens; with `params` the texts as well.

        params: fields of `SamplingParams` besides those of a greedy output of exactly `output_tokens` tokens.
        """
        assert self._process.stdin is not None
        request: dict[str, Any] = {"prompts": prompts, "output_tokens": output_tokens, "decode_only": decode_only}
        if params is not None:
            request["params"] = dict(params)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the log of the process tells more
        answer = self._read()
        self.peak_bytes = max(self.peak_bytes, peak_bytes(self._process.pid))
        return answer

    def cpu(self) -> float:
        return cpu_seconds(self._process.pid)

    def close(self) -> None:
        """Close the standard input of the process, and kill it if it does not end within 20 s."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = None
        if self.patience is not None:
            timer = threading.Timer(self.patience, self._process.kill)
            timer.start()
        line = self._process.stdout.readline()
        if timer is not None:
            timer.cancel()
        if not line:
            code = self._process.wait()
            output = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-15:]
            raise ContestantFailed(f"{self.name} ended with code {code}; its last output:\n" + "\n".join(output))
        answer: dict[str, Any] = json.loads(line)
        return answer


class LlamaCpp:
    """`llama-batched-bench`: one process a round, which loads the model, warms up and times itself."""

    start_seconds: float | None = None  # each round starts anew, outside the measured time

    def __init__(self, program: Path, model: Path, threads: int) -> None:
        self.name = "llama.cpp"
        self.versions = {"llama.cpp": _version(program)}
        self.peak_bytes = 0
        self._cpu = 0.0
        self._program, self._model, self._threads = program, model, threads

    def run(self, workload: Workload, prompts: list[list[int]], decode_only: bool) -> float:
        """Return the seconds of prompts and decoding, or with `decode_only` of decoding alone.

        The program uses random prompts of its own. Its first token takes a decode step, where other engines have it
        from the prompt: with one output token, the prompt's time is returned.
        """
        context = workload.concurrency * -(-workload.tokens // 256) * 256
        numbers = {"-npp": workload.prompt_tokens, "-ntg": workload.output_tokens, "-npl": workload.concurrency}
        numbers |= {"-c": context, "-t": self._threads}
        command = [str(self._program), "-m", str(self._model), "--output-format", "jsonl"]
        command += [str(word) for pair in numbers.items() for word in pair]
        with tempfile.TemporaryFile("w+") as out:
            process = subprocess.Popen(
                command, env=peer_environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
            spent = 0.0
            try:
                while process.poll() is None:
                    self.peak_bytes = max(self.peak_bytes, peak_bytes(process.pid))
                    spent = max(spent, cpu_seconds(process.pid))
                    time.sleep(0.05)
            finally:
                process.kill()
                process.wait()
            self._cpu += spent
            out.seek(0)
            text = out.read()
        if process.returncode != 0:
            words = "\n".join(text.strip().splitlines()[-15:])
            raise ContestantFailed(f"llama.cpp ended with code {process.returncode}; its last output:\n{words}")
        timing = parse_batched_bench(text, workload.concurrency)
        if workload.output_tokens == 1 and not decode_only:
            return timing.prompt_seconds
        return timing.decode_seconds if decode_only else timing.prompt_seconds + timing.decode_seconds

    def cpu(self) -> float:
        return self._cpu

    def close(self) -> None:
        pass


def dispec_engine(
    model: str, options: dict[str, Any], name: str = "dispec", environment: dict[str, str] | None = None
) -> Worker:
    """Start DiSpec's `LLM.generate` with engine options, and extra variables in its process."""
    settings = {"engine": "dispec", "model": model, "options": options}
    return _own_worker(name, settings, os.environ | environment if environment else None)


def transformers(name: str, settings: dict[str, Any]) -> Worker:
    """Start transformers' `generate`. settings: model, is_geometry, dtype, device, one_at_a_time."""
    return _own_worker(name, {"engine": "transformers"} | settings, peer_environment())


def _own_worker(name: str, settings: dict[str, Any], environment: dict[str, str] | None = None) -> Worker:
    command = [sys.executable, "-m", "dispec.bench.worker", json.dumps(settings)]
    return Worker(name, command, environment)


def _version(program: Path) -> str:
    """Return the version that a llama.cpp program prints, such as "b11434"."""
    done = subprocess.run([str(program), "--version"], capture_output=True, text=True, timeout=60, check=False)
    for line in (done.stdout + done.stderr).splitlines():
        if line.startswith("version:"):
            return line.removeprefix("version:").strip()
    return "unknown"


@contextlib.contextmanager
def started(starts: Mapping[str, Callable[[], Started]], *, at_once: bool = True) -> Iterator[list[Started]]:
    """Start contestants, yield those that start, in order and with these names, and end them afterwards.

    A contestant that does not start is left out, with its error printed.
    """
    running: dict[str, Started] = {}

    def start(name: str) -> None:
        try:
            contestant = starts[name]()
        except ContestantFailed as error:
            print(error, flush=True)
            return
        contestant.name = name
        running[name] = contestant
        seconds = contestant.start_seconds
        print(f"{name}: ready{'' if seconds is None else f' after {seconds:.0f} s'}", flush=True)

    try:
        with ThreadPoolExecutor(len(starts) if at_once else 1) as threads:
            list(threads.map(start, starts))
        yield [running[name] for name in starts if name in running]
    finally:
        with ThreadPoolExecutor(len(starts)) as threads:
            list(threads.map(lambda contestant: contestant.close(), running.values()))
