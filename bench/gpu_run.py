"""GPU tests and timings in one command for a short session on a GPU: checks first, then timings, then a short table.

    python -m dispec.bench.gpu_run --out /tmp/gpu --only test,memcheck    # 8 minutes of 16 cores
    python bench/gpu_run.py --out /tmp/gpu --no-checks                    # in a copy that is not installed

`bench.compare` times checkouts and vLLM beside each other instead.

Each part is a process of its own with its own log in `--out` and its own time limit, so that a part that hangs costs
only itself. Tests run beside each other, because compilation takes most of their time; timings run alone.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import typer

ROOT = Path(__file__).resolve().parent.parent
MODEL = "qwen2.5-1.5b"
_PYTEST = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts=-ra"]


class Part(NamedTuple):
    """A process. arguments: after the interpreter. seconds: its time limit. under: a command that runs it.

    cache: name of a cache of compiled code, which parts can share; empty for the user's cache.
    """

    name: str
    arguments: list[str]
    seconds: int
    under: tuple[str, ...] = ()
    cache: str = ""


def _tests(name: str, processes: int = 1, *options: str) -> Part:
    """Return a part that runs a file of tests, in several processes where pytest-xdist is installed."""
    beside = ["-n", str(processes)] if processes > 1 and find_spec("xdist") is not None else []
    return Part(f"test {name}", [*_PYTEST, *beside, f"tests/test_{name}.py", *options], 560)


_CHECKED = "(test_decode or test_ragged) and 64 and bfloat16 or write_kv and 64-16 or of_a_layer and bfloat16 and 17"
CHECKS = [
    _tests("gpu_graphs"),
    _tests("gpu_engine", 4),
    _tests("gpu_memory", 2),
    _tests("gpu_speculation", 3),
    _tests("block_transfer"),
    _tests("transfer_gpu"),
    _tests("gpu_kernels", 5),
    _tests("gpu_quantized", 8),
    _tests("gpu_fp8", 4),
    _tests("gpu_tensor_parallel"),  # skipped on a single GPU
    Part(
        "memcheck",
        [*_PYTEST, "tests/test_gpu_kernels.py", "-k", _CHECKED],
        560,
        ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
    ),
]
_THROUGHPUT = ["-m", "dispec.bench.throughput", "--model", MODEL, "--rounds", "2", "--peer", "none"]
_STEP = ["-m", "dispec.bench.profile_step", "--model", MODEL]
TIMINGS = [
    Part("cold start and step, c=1", _STEP, 150, cache="starts"),
    Part("warm start and step, c=1", _STEP, 120, cache="starts"),
    Part("warm start and step, c=32", [*_STEP, "--concurrency", "32"], 120, cache="starts"),
    Part("throughput", [*_THROUGHPUT, "--concurrency", "1,6,16,32,128"], 240),
    Part("prefill 2048", [*_THROUGHPUT, "--concurrency", "1", "--prompt-tokens", "2048", "--output-tokens", "1"], 120),
    Part("prefill 8192", [*_THROUGHPUT, "--concurrency", "1", "--prompt-tokens", "8192", "--output-tokens", "1"], 120),
    Part("context 8192", [*_THROUGHPUT, "--concurrency", "1,8", "--prompt-tokens", "8192", "--decode-only"], 120),
    Part("skinny gemm", ["-m", "dispec.bench.skinny_gemm", "--models", MODEL, "--tokens", "2,32"], 60),
    Part("context 32000", [*_THROUGHPUT, "--concurrency", "1", "--prompt-tokens", "32000", "--decode-only"], 120),
    Part("layers timed", ["-m", "dispec.bench.layer"], 240),
    Part("layers swept", ["-m", "dispec.bench.layer", "--tokens", "", "--sweep"], 240),
]
# Lines of a log to show, where it is more than usual.
_LINES = {"layers timed": 120, "layers swept": 60}


def import_path(tree: Path, scratch: Path) -> Path | None:
    """Return the folder to put on PYTHONPATH to import a checkout as `dispec`; None for one older than that package.

    scratch: folder for links in the place of `.ci/links`, which some ways of copying leave out.
    """
    package, links = tree / "serving" / "dispec", tree / ".ci" / "links"
    if not package.is_dir():
        return None
    if (links / "dispec" / "engine" / "__init__.py").exists():
        return links
    (scratch / "dispec").mkdir(parents=True, exist_ok=True)
    for path in [*package.iterdir(), *(tree / room for room in ("bench", "engine", "layers", "ops", "serving"))]:
        link = scratch / "dispec" / path.name
        if not link.is_symlink():
            link.symlink_to(path)
    return scratch


def start(part: Part, out: Path, caches: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a part with its output in a file. caches: a temporary folder."""
    log = out / f"{re.sub('[^a-z0-9]+', '_', part.name)}.log"
    folders = [str(import_path(ROOT, caches / "links")), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    if part.cache:
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
        environment |= {name: str(caches / part.cache) for name in ("DISPEC_CACHE_DIR", "TRITON_CACHE_DIR")}
    with log.open("wb") as file:
        return subprocess.Popen(
            [*part.under, sys.executable, *part.arguments],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        ), log


def finish(part: Part, process: subprocess.Popen[bytes], started: float) -> str:
    """Wait for a part up to its time limit; return how it ended."""
    try:
        code = process.wait(max(0.0, part.seconds - (time.monotonic() - started)))
    except subprocess.TimeoutExpired:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        return f"stopped after {part.seconds} s"
    return f"{'ok' if code == 0 else f'failed ({code})'} in {time.monotonic() - started:.0f} s"


def tail(log: Path, lines: int) -> str:
    """Return the last lines of a log, without the states of progress bars but the last."""
    text = log.read_text(errors="replace")
    kept = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n") if "Warn" not in line]
    return "\n".join(f"    {line}" for line in [line for line in kept if line][-lines:])


def main(
    out: Annotated[Path, typer.Option(help="Folder for the logs.")],
    checks: Annotated[bool, typer.Option(help="Run the tests and the memory checker.")] = True,
    only: Annotated[str, typer.Option(help="Comma-separated beginnings of the names of parts to run.")] = "",
    minutes: Annotated[float, typer.Option(help="Start nothing after this long.")] = 9.0,
) -> None:
    """Run the parts that there is time for and print how each ended."""
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    wanted = [name.strip() for name in only.split(",") if name.strip()]

    def is_wanted(part: Part) -> bool:
        return not wanted or any(part.name.startswith(name) for name in wanted)

    def limited(part: Part) -> Part:
        return part._replace(seconds=int(min(part.seconds, minutes * 60 - (time.monotonic() - began))))

    with tempfile.TemporaryDirectory(prefix="dispec-gpu-run-", ignore_cleanup_errors=True) as folder:
        caches = Path(folder)
        running = [(limited(part), *start(part, out, caches)) for part in CHECKS if checks and is_wanted(part)]
        for part, process, log in running:
            end = finish(part, process, began)
            print(f"{part.name}: {end}\n{tail(log, 3 if end.startswith('ok') else 16)}", flush=True)
        for part in filter(is_wanted, TIMINGS):
            if time.monotonic() - began > minutes * 60 - 20:
                print(f"{part.name}: not started, no time left", flush=True)
                continue
            started = time.monotonic()
            part = limited(part)
            process, log = start(part, out, caches)
            lines = _LINES.get(part.name, 22 if "step" in part.name else 10)
            print(f"{part.name}: {finish(part, process, started)}\n{tail(log, lines)}", flush=True)


if __name__ == "__main__":
    typer.run(main)
