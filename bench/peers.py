"""Peers chosen on the command line, started; bench/RESULTS.md says how to install them."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dispec.bench.contestants import ROOT, Contestant, LlamaCpp, Worker, dispec_engine, peer_environment, transformers
from dispec.bench.geometries import NAMES, geometry
from dispec.bench.loading import config_of, useful_kv_memory
from dispec.engine.dtypes import DTYPES

PEERS = ("transformers", "vllm", "llama.cpp")

Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peer", help=f"{', '.join(PEERS)}, or none; can be given several times.", show_default="transformers"
    ),
]
PeerPython = Annotated[Path | None, typer.Option(help="vLLM: the Python of the environment it is installed in.")]
PeerHf = Annotated[
    Path | None, typer.Option(help="vLLM: the same model as a Hugging Face directory.", show_default="--model")
]
PeerPreload = Annotated[
    str | None,
    typer.Option(help="vLLM: colon-separated libraries to preload.", show_default="its libiomp5, tcmalloc if found"),
]
PeerBin = Annotated[Path | None, typer.Option(help="llama.cpp: the program llama-batched-bench.")]
PeerGguf = Annotated[
    Path | None, typer.Option(help="llama.cpp: the same model as a GGUF file.", show_default="--model")
]

_TCMALLOC = (
    "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
    "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4",
)


@dataclass(frozen=True)
class PeerChoice:
    """Which peers run, and where they are installed. Raises ValueError that names the option that is missing."""

    names: tuple[str, ...]
    python: Path | None
    hf: Path | None
    preload: str | None
    program: Path | None
    gguf: Path | None

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in PEERS:
                raise ValueError(f"--peer is {name!r}, must be one of {', '.join(PEERS)}, none")
        if "vllm" in self.names:
            _require_file("--peer-python", self.python, "vllm")
        if "llama.cpp" in self.names:
            _require_file("--peer-bin", self.program, "llama.cpp")


def choose_peers(
    names: list[str] | None,
    python: Path | None,
    hf: Path | None,
    preload: str | None,
    program: Path | None,
    gguf: Path | None,
) -> PeerChoice:
    """Return the choice that the options make."""
    chosen = tuple(dict.fromkeys(["transformers"] if names is None else names))
    return PeerChoice(() if chosen == ("none",) else chosen, python, hf, preload, program, gguf)


@contextmanager
def contestants(
    peers: PeerChoice, model: str, dtype: str, device: str | None, sequences: int, tokens: int, **options: Any
) -> Iterator[list[Contestant]]:
    """Start DiSpec and the peers, ready for `sequences` of `tokens`, and end them when the context ends.

    options: of DiSpec's engine.
    """
    is_cuda = (device or "").startswith("cuda") or (device is None and _has_cuda())
    options |= {"dtype": dtype, "device": device, "max_num_seqs": sequences, "max_model_len": tokens}
    if is_cuda:  # otherwise it takes all free memory, and peers find none
        memory = useful_kv_memory(config_of(model), sequences, tokens, DTYPES[dtype].itemsize)
        options.setdefault("kv_cache_memory", memory)
    with ExitStack() as stack:
        started: list[Contestant] = []

        def add(contestant: Contestant) -> None:
            stack.callback(contestant.close)
            started.append(contestant)

        add(dispec_engine(model, options))
        for name in peers.names:
            if name == "transformers":
                settings = {"model": model, "is_geometry": model in NAMES, "dtype": dtype, "device": device}
                add(transformers(name, settings))
            elif name == "vllm":
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dispec-bench-shapes-")))
                add(start_vllm(peers, model, dtype, is_cuda, sequences, tokens, folder))
            else:
                add(_llama_cpp(peers, model))
        yield started


def start_vllm(
    peers: PeerChoice,
    model: str,
    dtype: str,
    is_cuda: bool,
    sequences: int,
    tokens: int,
    folder: Path,
    name: str = "vllm",
    **more: Any,
) -> Worker:
    """Start vLLM, ready for `sequences` of `tokens`. folder: for files of its process. more: options of its engine."""
    assert peers.python is not None
    settings = {"dtype": dtype, "max_num_seqs": sequences, "max_model_len": tokens, "enable_prefix_caching": True}
    settings |= more
    if model in NAMES:
        (folder / "config.json").write_text(json.dumps(geometry(model) | {"torch_dtype": dtype}))
        settings |= {"model": str(folder), "load_format": "dummy"}
    else:
        directory = peers.hf or Path(model)
        if not (directory / "config.json").is_file():
            raise ValueError(f"--peer vllm needs the model as a Hugging Face directory: --peer-hf, {directory} is none")
        settings["model"] = str(directory)
    environment = peer_environment() | {"HF_HUB_OFFLINE": "1"}
    if not is_cuda:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        kv_memory = useful_kv_memory(config_of(model), sequences, tokens, DTYPES[dtype].itemsize, block_size=128)
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(max(2, -(-kv_memory // 2**30))),  # GiB
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        }
        preload = peers.preload if peers.preload is not None else ":".join(_preload(peers.python))
        if preload:
            environment["LD_PRELOAD"] = preload
            print(f"{name}: LD_PRELOAD={preload}", flush=True)
    # -I: file names of this folder must not hide modules of vLLM's environment.
    return Worker(
        name, [str(peers.python), "-I", str(ROOT / "bench" / "vllm_worker.py"), json.dumps(settings)], environment
    )


def _llama_cpp(peers: PeerChoice, model: str) -> LlamaCpp:
    gguf = peers.gguf or Path(model)
    if gguf.suffix != ".gguf" or not gguf.is_file():
        raise ValueError(f"--peer llama.cpp needs the model as a GGUF file: --peer-gguf, {gguf} is none")
    import torch

    assert peers.program is not None
    return LlamaCpp(peers.program.absolute(), gguf.absolute(), torch.get_num_threads())


def _preload(python: Path) -> list[str]:
    """Return the libraries that vLLM's documentation recommends to preload on CPU, if installed."""
    own = python.absolute().parent.parent / "lib" / "libiomp5.so"
    return [path for path in (*_TCMALLOC, str(own)) if Path(path).is_file()]


def _require_file(option: str, path: Path | None, peer: str) -> None:
    if path is None:
        raise ValueError(f"--peer {peer} needs {option}")
    if not path.is_file():
        raise ValueError(f"{option} is {path}, which is not a file")


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())
