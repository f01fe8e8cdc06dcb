"""A `dispec serve` process that a benchmark starts."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dispec.bench.contestants import ROOT


class ServeProcess(NamedTuple):
    """A server that listens. address: host and port."""

    address: str
    pid: int


@contextlib.contextmanager
def serving(
    options: list[str], environment: Mapping[str, str] | None = None, *, is_silent: bool = False
) -> Iterator[ServeProcess]:
    """Run `dispec serve` on a free port, and end it. Raises RuntimeError if it ends before it listens.

    environment: None is this process's. is_silent: drop what it writes to standard error.
    """
    command = [sys.executable, "-m", "dispec", "serve", "--port", "0", *options]
    errors = subprocess.DEVNULL if is_silent else None
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process:
        assert process.stdout is not None
        try:
            found = next(filter(None, (re.search(r"http://(\S+)/dashboard", line) for line in process.stdout)), None)
            if found is None:
                hint = f": run `dispec serve {' '.join(options)}` to see why" if is_silent else ""
                raise RuntimeError(f"dispec serve ended before it listened{hint}")
            yield ServeProcess(found.group(1), process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
