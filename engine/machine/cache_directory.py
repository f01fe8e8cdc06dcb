"""The directory of downloads, converted tokenizers and compiled code. Imports no torch."""

import atexit
import functools
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import platformdirs

from dispec.engine.machine.owned_directory import OwnedDirectory

_MIN_FREE_BYTES = 64 * 2**20  # below it a cache counts as full: compiled code takes some 30 MB
_substitutes: list[OwnedDirectory] = []  # for cache directories that cannot be written


def cache_directory() -> Path:
    """Return `DISPEC_CACHE_DIR`, else the system's directory for caches. It need not exist."""
    chosen = os.environ.get("DISPEC_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("dispec"))


def check_writable(directory: Path) -> None:
    """Make a directory and a file in it. Raise OSError if that fails, or if less than 64 MiB are free."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        free = shutil.disk_usage(directory).free
    if free < _MIN_FREE_BYTES:
        raise OSError(f"{free / 2**20:.0f} MiB free, {_MIN_FREE_BYTES / 2**20:.0f} needed")


def writable_cache() -> Path:
    """Return the cache directory; if it is not writable, a temporary one until the process ends, with a warning."""
    return _writable(cache_directory())


@functools.cache
def _writable(directory: Path) -> Path:
    try:
        check_writable(directory)
    except OSError as error:
        substitute = OwnedDirectory("dispec-cache-")
        _substitutes.append(substitute)
        warnings.warn(
            f"the cache directory {directory} cannot be used ({error.strerror or error}): nothing is kept for the next"
            " start (set DISPEC_CACHE_DIR to a directory that can be written)",
            RuntimeWarning,
            stacklevel=3,
        )
        return Path(substitute.path)
    return directory


@atexit.register
def remove_substitutes() -> None:
    """Remove the temporary directories. A process that ends with `os._exit` must call it."""
    for substitute in _substitutes:
        substitute.remove()


def cache_path(*parts: str) -> Path:
    """Return the path of a cache entry: where it exists, else where it can be written."""
    kept = cache_directory().joinpath(*parts)
    return kept if kept.exists() else writable_cache().joinpath(*parts)
