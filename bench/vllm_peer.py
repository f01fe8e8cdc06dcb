"""vLLM as a contestant: installed for a Python of its own, or as a directory of packages that this Python can run."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from dispec.bench.contestants import ROOT, Worker, peer_environment
from dispec.bench.geometries import NAMES, geometry

VllmPath = Annotated[Path | None, typer.Option(help="vLLM: directory of its packages, for this Python.")]

_TCMALLOC = (
    "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
    "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4",
)


@dataclass(frozen=True)
class VLLM:
    """Starts vLLM.

    python: runs it. site: directory of its packages; None where they are installed for `python`.
    config: added to the config.json of a geometry, such as a `quantization_config`.
    preload: libraries on a CPU, colon-separated; None takes those of vLLM's documentation that are installed.
    """

    python: str = sys.executable
    site: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    preload: str | None = None

    def start(
        self,
        model: str,
        options: Mapping[str, Any],
        folder: Path,
        *,
        is_cuda: bool,
        name: str = "vllm",
        environment: Mapping[str, str] | None = None,
        patience: float | None = None,
    ) -> Worker:
        """Start `vllm.LLM` with these options, on CUDA in one process, which is its fastest way offline.

        model: a geometry's name or a Hugging Face directory. folder: for the geometry's config.json.
        environment: of the process, in place of this one's. patience: as of `Worker`.
        """
        settings: dict[str, Any] = {"dtype": "bfloat16", **options}
        if model in NAMES:
            folder.mkdir(parents=True, exist_ok=True)
            config = geometry(model) | {"torch_dtype": settings["dtype"]} | dict(self.config)
            (folder / "config.json").write_text(json.dumps(config))
            settings |= {"model": str(folder), "load_format": "dummy"}
        else:
            settings["model"] = model
        variables = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | (
            self._on_cuda() if is_cuda else self._on_cpu()
        )
        if self.site is not None:
            variables["PYTHONPATH"] = str(self.site)
        # File names of this folder must not hide modules of vLLM's environment. -I would also hide `site`.
        command = [self.python, "-I" if self.site is None else "-P", str(ROOT / "bench" / "vllm_worker.py")]
        started_in = peer_environment() if environment is None else environment
        return Worker(name, [*command, json.dumps(settings)], {**started_in, **variables}, patience=patience)

    def _on_cuda(self) -> dict[str, str]:
        return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}

    def _on_cpu(self) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        found = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
        own = Path(self.python).absolute().parent.parent / "lib" / "libiomp5.so"
        recommended = ":".join(path for path in (*_TCMALLOC, str(own)) if Path(path).is_file())
        preload = self.preload if self.preload is not None else recommended
        if preload:
            print(f"vllm: LD_PRELOAD={preload}", flush=True)
            found["LD_PRELOAD"] = preload
        return found


def memory_on_cuda(kv_bytes: int) -> dict[str, Any]:
    """Return vLLM's options for a KV cache of twice `kv_bytes`, so that other contestants fit on the GPU."""
    return {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 2 * kv_bytes}
