"""Checkouts of DiSpec as contestants."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dispec.bench.contestants import ROOT, Worker
from dispec.bench.gpu_run import import_path

DTYPE = "bfloat16"


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
            cached_in(cache) | {"PYTHONPATH": os.pathsep.join([str(links or self.directory), *others])},
            directory=self.directory,
            patience=patience,
        )


def cached_in(cache: Path) -> dict[str, str]:
    """Return this process's variables, with a folder for compiled code."""
    ours = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    caches = {"DISPEC_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache / "triton", "VLLM_CACHE_ROOT": cache / "vllm"}
    return ours | {name: str(folder) for name, folder in caches.items()}
