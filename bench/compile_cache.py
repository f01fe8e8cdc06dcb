"""Environment variables of a process that starts with an empty compile cache."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dispec.engine.machine.cache_directory import cache_directory

_KEPT = ("models", "tokenizers")  # shared with the user's cache: downloads are not what is measured
_COMPILERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@contextmanager
def fresh_cache() -> Iterator[dict[str, str]]:
    """Yield variables that name an empty compile cache, which lives until the context ends."""
    with TemporaryDirectory(prefix="dispec-bench-cache-", ignore_cleanup_errors=True) as folder:
        for name in _KEPT:
            source = cache_directory() / name
            source.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).symlink_to(source)
        # These variables would name directories that other processes have filled.
        ours = {name: value for name, value in os.environ.items() if name not in _COMPILERS}
        yield ours | {"DISPEC_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder) / "triton")}
