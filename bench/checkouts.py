"""Contestants of `bench.compare`: checkouts of DiSpec, and vLLM, each in a process of its own."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dispec.bench.contestants import ROOT, ContestantFailed, Worker
from dispec.bench.geometries import geometry
from dispec.bench.gpu_run import import_path

DTYPE = "bfloat16"

# Starts a contestant. Arguments: folder for its compiled code, and seconds to wait for each answer.
Start = Callable[[Path, float], Worker]


class Tree(NamedTuple):
    """A checkout of DiSpec."""

    name: str
    directory: Path

    def start(self, model: str, options: Mapping[str, Any], cache: Path, patience: float) -> Worker:
        """Start the checkout's own `bench.worker`. Old checkouts have top-level packages instead of `dispec`."""
        links = import_path(self.directory, cache / "links")
        module = "bench.worker" if links is None else "dispec.bench.worker"
        own = (ROOT, ROOT / ".ci" / "links")
        others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and Path(part) not in own]
        settings = {"engine": "dispec", "model": model, "options": {"dtype": DTYPE, **options}}
        return Worker(
            self.name,
            [sys.executable, "-m", module, json.dumps(settings)],
            _environment(cache) | {"PYTHONPATH": os.pathsep.join([str(links or self.directory), *others])},
            directory=self.directory,
            patience=patience,
        )


class VLLM(NamedTuple):
    """vLLM in one process, its fastest way to run offline.

    site: the folder of its packages. config: added to the model's config.json, such as a `quantization_config`.
    """

    python: str
    site: Path
    config: Mapping[str, Any] = {}

    def start(self, model: str, options: Mapping[str, Any], cache: Path, patience: float) -> Worker:
        folder = cache / model
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(geometry(model) | {"torch_dtype": DTYPE} | dict(self.config)))
        settings = {"model": str(folder), "load_format": "dummy", "dtype": DTYPE, **options}
        environment = _environment(cache) | {
            "PYTHONPATH": str(self.site),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
        }
        # -P: modules of this folder must not shadow those of vLLM's environment.
        command = [self.python, "-P", str(ROOT / "bench" / "vllm_worker.py"), json.dumps(settings)]
        return Worker("vllm", command, environment, patience=patience)


def _environment(cache: Path) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    return ours | {"DISPEC_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}


@contextlib.contextmanager
def started(starts: Mapping[str, Start], cache: Path, patience: float) -> Iterator[list[Worker]]:
    """Start all contestants at once, yield those that start, and end them afterwards."""
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
