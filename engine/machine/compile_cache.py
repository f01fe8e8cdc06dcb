"""The directory of compiled code. Imports nothing of the compiler."""

import os
import tempfile
from pathlib import Path

import torch

from dispec.engine.machine.cache_directory import writable_cache


def choose_compile_cache() -> Path:
    """Keep compiled code in the user's cache directory, unless TORCHINDUCTOR_CACHE_DIR names another.

    Inductor sets that variable to its default, a temporary directory, and child processes inherit it: such a value is
    replaced. Triton's kernels are kept in a sub-directory, unless TRITON_CACHE_DIR names another: Inductor sets that
    variable only when it generates code, so a second process, which finds code, would compile the kernels again.
    """
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if chosen is None or _is_default(Path(chosen)):
        chosen = str(writable_cache() / f"inductor-torch-{torch.__version__}")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = chosen
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(chosen) / "triton"))
    return Path(chosen)


def _is_default(directory: Path) -> bool:
    return directory.parent == Path(tempfile.gettempdir()) and directory.name.startswith("torchinductor_")
