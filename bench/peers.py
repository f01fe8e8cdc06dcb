"""Peers chosen on the command line, started; bench/RESULTS.md says how to install them."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dispec.bench.contestants import (
    Contestant,
    ContestantFailed,
    LlamaCpp,
    Worker,
    dispec_engine,
    peer_environment,
    started,
    transformers,
)
from dispec.bench.geometries import NAMES
from dispec.bench.loading import config_of, useful_kv_memory
from dispec.bench.vllm_peer import VLLM, memory_on_cuda
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


@dataclass(frozen=True)
class PeerChoice:
    """Which peers run, and where they are installed. Raises ValueError that names the option that is missing."""

    names: tuple[str, ...]
    python: Path | None
    hf: Path | None
    preload: str | None
    program: Path | None
    gguf: Path | None
    site: Path | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in PEERS:
                raise ValueError(f"--peer is {name!r}, must be one of {', '.join(PEERS)}, none")
        if "vllm" in self.names:
            if self.site is None:
                _require_file("--peer-python", self.python, "vllm", "--vllm-path")
            elif not (self.site / "vllm").is_dir():
                raise ValueError(f"--vllm-path is {self.site}, which has no package vllm")
        if "llama.cpp" in self.names:
            _require_file("--peer-bin", self.program, "llama.cpp")


def choose_peers(
    names: list[str] | None,
    python: Path | None,
    hf: Path | None,
    preload: str | None,
    program: Path | None,
    gguf: Path | None,
    site: Path | None = None,
) -> PeerChoice:
    """Return the choice that the options make. site: of --vllm-path. Raises ValueError for that without vLLM."""
    chosen = tuple(dict.fromkeys(["transformers"] if names is None else names))
    chosen = () if chosen == ("none",) else chosen
    if site is not None and "vllm" not in chosen:
        raise ValueError("--vllm-path needs --peer vllm")
    return PeerChoice(chosen, python and python.absolute(), hf, preload, program, gguf, site and site.absolute())


@contextmanager
def contestants(
    peers: PeerChoice, model: str, dtype: str, device: str | None, sequences: int, tokens: int, **options: Any
) -> Iterator[list[Contestant]]:
    """Start DiSpec and the peers, ready for `sequences` of `tokens`, and end them when the context ends.

    options: of DiSpec's engine. Raises ContestantFailed if one of them does not start.
    """
    is_cuda = on_cuda(device)
    options |= {"dtype": dtype, "device": device, "max_num_seqs": sequences, "max_model_len": tokens}
    if is_cuda:  # otherwise it takes all free memory, and peers find none
        memory = useful_kv_memory(config_of(model), sequences, tokens, DTYPES[dtype].itemsize)
        options.setdefault("kv_cache_memory", memory)
    with tempfile.TemporaryDirectory(prefix="dispec-bench-peers-", ignore_cleanup_errors=True) as folder:
        starts: dict[str, Callable[[], Contestant]] = {"dispec": partial(dispec_engine, model, options)}
        for name in peers.names:
            if name == "transformers":
                settings = {"model": model, "is_geometry": model in NAMES, "dtype": dtype, "device": device}
                starts[name] = partial(transformers, name, settings)
            elif name == "vllm":
                starts[name] = partial(start_vllm, peers, model, dtype, is_cuda, sequences, tokens, Path(folder))
            else:
                starts[name] = partial(_llama_cpp, peers, model)
        # On a GPU's machine cores are many; on a CPU one would compile while another measures its memory.
        with started(starts, at_once=is_cuda) as running:
            if missing := starts.keys() - {contestant.name for contestant in running}:
                raise ContestantFailed(f"{', '.join(sorted(missing))} did not start")
            yield running


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
    options = {"dtype": dtype, "max_num_seqs": sequences, "max_model_len": tokens, "enable_prefix_caching": True} | more
    directory = model
    if model not in NAMES:
        directory = str(peers.hf or model)
        if not (Path(directory) / "config.json").is_file():
            raise ValueError(f"--peer vllm needs the model as a Hugging Face directory: --peer-hf, {directory} is none")
    environment = peer_environment()
    block_size = 32 if is_cuda else 128
    memory = useful_kv_memory(config_of(model), sequences, tokens, DTYPES[dtype].itemsize, block_size=block_size)
    if is_cuda:
        options |= memory_on_cuda(memory)
    else:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(2, -(-memory // 2**30)))  # GiB
    vllm = VLLM(str(peers.python or sys.executable), peers.site, preload=peers.preload)
    return vllm.start(directory, options, folder, is_cuda=is_cuda, name=name, environment=environment)


def _llama_cpp(peers: PeerChoice, model: str) -> LlamaCpp:
    gguf = peers.gguf or Path(model)
    if gguf.suffix != ".gguf" or not gguf.is_file():
        raise ValueError(f"--peer llama.cpp needs the model as a GGUF file: --peer-gguf, {gguf} is none")
    import torch

    assert peers.program is not None
    return LlamaCpp(peers.program.absolute(), gguf.absolute(), torch.get_num_threads())


def _require_file(option: str, path: Path | None, peer: str, other: str = "") -> None:
    if path is None:
        raise ValueError(f"--peer {peer} needs {option}{f' or {other}' if other else ''}")
    if not path.is_file():
        raise ValueError(f"{option} is {path}, which is not a file")


def on_cuda(device: str | None) -> bool:
    """Return whether contestants run on a GPU. device: of the command line."""
    if device is not None:
        return device.startswith("cuda")
    import torch

    return bool(torch.cuda.is_available())
