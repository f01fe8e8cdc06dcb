"""`dispec serve` on a tiny checkpoint, as a process of its own, for tests that talk to it from outside."""

import re
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from tests.commands import eager, read_until, running

PATIENCE = 120  # seconds after which a condition counts as never coming


class Server(NamedTuple):
    url: str
    process: subprocess.Popen[bytes]

    def completion(self, prompt: str, max_tokens: int, key: str | None = None, **fields: object) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=PATIENCE)


@contextmanager
def serving(directory: Path, *args: str, port: int = 0) -> Iterator[Server]:
    """A server that has said where it listens, and so is ready."""
    command = ["serve", *eager(str(directory)), "--dtype", "float32", "--port", str(port), *args]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        said = read_until(process.stdout, "/dashboard\n")
        found = re.search(r"http://[^/\s]+", said)
        assert found is not None
        yield Server(found.group(), process)


@contextmanager
def under_load(server: Server, concurrency: int = 4, max_tokens: int = 150, key: str | None = None) -> Iterator[None]:
    """So many requests are under way all the time, half of whose prompts have been seen before."""
    over = threading.Event()

    def ask(number: int) -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            prompt = "the same text for everybody, again and again " * 4 if turn % 2 else f"{number} {turn} is new"
            assert server.completion(prompt, max_tokens, key).status_code == 200

    with ThreadPoolExecutor(concurrency) as threads:
        tasks = [threads.submit(ask, number) for number in range(concurrency)]
        try:
            yield
        finally:
            over.set()
    for task in tasks:
        task.result()
