"""Pictures of the dashboard: idle, under load in light and dark and on a phone, and after the engine's death.

    dispec bench dashboard --output pictures
    dispec bench dashboard --output serving/dashboard --picture light --picture dark   # those of the README

Needs playwright (`pip install playwright`) and Chromium (`apt-get install chromium` or `playwright install chromium`).
"""

import contextlib
import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import psutil
import typer
from tqdm import tqdm

from dispec.bench.serve_process import serving

Picture = Literal["idle", "light", "dark", "phone", "dead"]
PICTURES: tuple[Picture, ...] = ("idle", "light", "dark", "phone", "dead")
WIDE, PHONE = (1440, 1000), (390, 844)  # pixels
_PATIENCE = 60  # seconds
_TOPICS = ("the sea", "a lighthouse", "winter", "an old train", "bread", "the moon", "a garden", "two brothers")


@contextlib.contextmanager
def under_load(url: str, concurrency: int) -> Iterator[None]:
    """Keep `concurrency` requests of different lengths running, every third one with a prompt that begins like others;
    one in 20 is left by its client."""
    over = threading.Event()
    numbers = itertools.count()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=_PATIENCE) as client:
            while not over.is_set():
                number = next(numbers)
                topic = _TOPICS[number % len(_TOPICS)]
                start = "You write long, calm stories for children. " * 12 if number % 3 else f"Story {number}: "
                body = {
                    "prompt": f"{start}Write about {topic}.",
                    "max_tokens": 40 + 37 * number % 240,
                    "ignore_eos": True,
                }
                with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
                    for count, _ in enumerate(response.iter_lines()):
                        if over.is_set() or (number % 20 == 7 and count > 20):
                            break

    with ThreadPoolExecutor(concurrency) as threads:
        tasks = [threads.submit(ask) for _ in range(concurrency)]
        try:
            yield
        finally:
            over.set()
    for task in tasks:
        task.result()


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium. Raises ValueError with what to install if something is missing."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise ValueError("bench dashboard needs playwright: pip install playwright") from None
    with sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except Error:
            raise ValueError("bench dashboard needs Chromium: apt-get install chromium") from None
        yield browser
        browser.close()


class Photographer:
    """Takes pictures of a server's dashboard into a directory."""

    def __init__(self, browser: Any, url: str, directory: Path) -> None:
        self._browser = browser
        self._url = url
        self._directory = directory

    @contextlib.contextmanager
    def page(self, scheme: Literal["light", "dark"], size: tuple[int, int]) -> Iterator[Any]:
        """Open the dashboard and wait for its first event."""
        context = self._browser.new_context(
            color_scheme=scheme, viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce"
        )
        page = context.new_page()
        page.set_default_timeout(_PATIENCE * 1000)
        page.goto(f"{self._url}/dashboard")
        page.wait_for_function("() => document.querySelector('#state').dataset.state === 'ready'")
        yield page
        context.close()

    def take(self, page: Any, picture: Picture, *, full_page: bool = False) -> None:
        if full_page:  # charts off the screen are not drawn
            height = page.evaluate("() => document.documentElement.scrollHeight")
            page.set_viewport_size({"width": page.viewport_size["width"], "height": height})
        page.evaluate("() => document.activeElement.blur()")  # no focus ring
        page.wait_for_timeout(1500)  # an event, and the charts that come onto the screen with it
        path = self._directory / f"dashboard-{picture}.png"
        page.screenshot(path=path)
        tqdm.write(f"{path}  {path.stat().st_size / 1000:.0f} kB")


def _chat(page: Any) -> None:
    """Ask the model something through the page, so that the chat is not empty, and wait for its answer."""
    page.locator("#chat summary").click()
    page.fill("#chat-temperature", "0")
    page.locator("#chat summary").click()
    page.fill("#chat-input", "What is the capital of France? Answer briefly.")
    page.press("#chat-input", "Enter")
    page.wait_for_timeout(8000)
    page.wait_for_function("() => document.getElementById('chat-send').textContent.trim() === 'Send'")


def _kill_engine(server_pid: int) -> None:
    """Kill the engine of a server that does not restart it."""
    for child in psutil.Process(server_pid).children(recursive=True):
        if "dispec.engine.process.engine_loop" in child.cmdline():
            os.kill(child.pid, signal.SIGKILL)


def main(
    output: Annotated[Path, typer.Option(help="Directory of the pictures, dashboard-*.png.")],
    model: Annotated[str, typer.Option(help="Directory, hub id, .gguf file or built-in name.")] = "smollm2",
    picture: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PICTURES)}; all by default.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way.")] = 6,
    seconds: Annotated[float, typer.Option(min=0, help="Load before the pictures.")] = 75,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Fewer than the requests: some wait.")] = 4,
) -> None:
    """Take pictures of a server's dashboard."""
    wanted = picture or list(PICTURES)
    if unknown := set(wanted) - set(PICTURES):
        raise ValueError(f"--picture is {unknown.pop()!r}, must be one of {', '.join(PICTURES)}")
    output.mkdir(parents=True, exist_ok=True)
    options = ["--model", model, "--max-num-seqs", str(max_num_seqs), "--max-engine-restarts", "0"]
    with chromium() as browser, serving(options, is_silent=True) as server:
        url = f"http://{server.address}"
        camera = Photographer(browser, url, output)
        if "idle" in wanted:
            with camera.page("light", WIDE) as page:
                camera.take(page, "idle")
        if {"light", "dark", "phone"} & set(wanted):
            with under_load(url, concurrency):
                time.sleep(seconds)
                for scheme in ("light", "dark"):
                    if scheme in wanted:
                        with camera.page(scheme, WIDE) as page:
                            _chat(page)
                            camera.take(page, scheme)
                if "phone" in wanted:
                    with camera.page("light", PHONE) as page:
                        camera.take(page, "phone", full_page=True)
        if "dead" in wanted:
            with camera.page("dark", WIDE) as page:
                _kill_engine(server.pid)
                page.wait_for_function("() => document.querySelector('#state').dataset.state === 'dead'")
                camera.take(page, "dead")


if __name__ == "__main__":
    typer.run(main)
