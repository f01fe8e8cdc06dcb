"""Where compiled code is kept. Imports nothing of the compiler."""

import os
import tempfile
from pathlib import Path

import torch

from dispec.engine.machine.cache_directory import writable_cache


def choose_compile_cache() -> Path:
    """Keep compiled code in the user's cache directory, unless TORCHINDUCTOR_CACHE_DIR names another.

    Inductor writes its default, a temporary directory, into that variable as soon as it is asked for it, and processes
    inherit it: that is no choice of the user's. Triton's kernels are kept beneath it, unless TRITON_CACHE_DIR names
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
