"""An environment for a process that finds no compiled code, or what an earlier one of the same left there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dispec.engine.machine.cache_directory import cache_directory

_KEPT = ("models", "tokenizers")  # of the user's cache: a download is no compilation
_COMPILERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@contextmanager
def fresh_cache() -> Iterator[dict[str, str]]:
    """Environment variables under which nothing is compiled yet; what becomes compiled is kept until the end."""
    with TemporaryDirectory(prefix="dispec-bench-cache-", ignore_cleanup_errors=True) as folder:
        for name in _KEPT:
            source = cache_directory() / name
            source.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).symlink_to(source)
        # The compilers' own variables would name places that other processes have filled.
        ours = {name: value for name, value in os.environ.items() if name not in _COMPILERS}
        yield ours | {"DISPEC_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder) / "triton")}
