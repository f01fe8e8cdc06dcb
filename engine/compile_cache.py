"""Where compiled code is kept, and what is known to be there. Imports nothing of the compiler."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import msgspec
import torch

from engine.cache import writable_cache
from layers.config import ModelConfig

_ROOT = Path(__file__).resolve().parent.parent
_COMPILED_FROM = ("layers", "ops", "engine")


class CompileKey(msgspec.Struct, frozen=True):
    """All that decides which graphs an engine compiles. `threads` are in the loops that are generated for a CPU.

    max_num_drafts: a step that verifies draft tokens has several rows, also in an engine of one sequence.

    device: "cpu", or the name of a GPU.
    """

    config: ModelConfig
    dtype: str
    block_size: int
    max_num_seqs: int
    max_num_drafts: int
    overlaps: bool
    threads: int
    device: str = "cpu"


def choose_compile_cache() -> Path:
    """Keep compiled code in the user's cache directory, unless TORCHINDUCTOR_CACHE_DIR names another.

    Inductor writes its default, a temporary directory, into that variable as soon as anybody asks for it, and
    processes inherit it: that is nobody's choice. Triton's kernels are kept beneath it, unless TRITON_CACHE_DIR names
    another: Inductor moves them there once it generates code, which it does not where it finds some, so that a second
    process would look elsewhere and compile them again.
    """
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if chosen is None or _is_default(Path(chosen)):
        chosen = str(writable_cache() / f"inductor-torch-{torch.__version__}")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = chosen
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(chosen) / "triton"))
    return Path(chosen)


def _is_default(directory: Path) -> bool:
    return directory.parent == Path(tempfile.gettempdir()) and directory.name.startswith("torchinductor_")


def write_stamp(key: CompileKey) -> None:
    """Note that all graphs of a key are in the cache, for the next start."""
    with contextlib.suppress(OSError):  # then the next start looks for itself
        stamp(key).touch()


def stamp(key: CompileKey) -> Path:
    """Return the file that says that all graphs of a key are in the cache: it goes when the cache goes."""
    digest = hashlib.sha256(msgspec.json.encode(key))
    switches = [os.environ.get(name) for name in ("DISPEC_CPU_KERNELS", "DISPEC_PACKED_WEIGHTS")]
    digest.update(f"{torch.__version__} {switches} {_processor()}".encode())
    for package in _COMPILED_FROM:
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return choose_compile_cache() / f"dispec-{digest.hexdigest()[:24]}"


def _processor() -> str:
    """What generated code is made for: a cache may be shared between machines."""
    return torch.backends.cpu.get_cpu_capability()
