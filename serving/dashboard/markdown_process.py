"""Rendering of Markdown in a process of its own."""

import asyncio
import contextlib
import sys

import msgspec

from dispec.serving.http.errors import ApiError

MAX_TEXT = 200_000  # characters
TIMEOUT = 3.0  # seconds for one text
MAX_WAITING = 100  # texts; browsers send at most that many requests at once
_MODULE = "dispec.serving.dashboard.markdown"
_LINE_LIMIT = 64 * 2**20  # bytes; a character becomes up to some 60 bytes of HTML


class MarkdownProcess:
    """Renders one text at a time in a child process, which the first text starts and the end of this process ends.

    Pygments' regular expressions take 8 s for 10,000 blank lines of C and hold the GIL meanwhile: in the server's own
    process they would stop all streams.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self._timeout = timeout
        self._lock = asyncio.Lock()
        self._num_waiting = 0
        self._process: asyncio.subprocess.Process | None = None

    async def render(self, text: str) -> bytes:
        """Return the JSON of `render_blocks`.

        Raises ApiError: 503 for a text that takes longer than the timeout, and while MAX_WAITING others wait.
        """
        if self._num_waiting >= MAX_WAITING:
            raise ApiError(503, f"{self._num_waiting} texts are waiting, which is the most", retry_after=1)
        self._num_waiting += 1
        try:
            async with self._lock:
                return await self._render(text)
        finally:
            self._num_waiting -= 1

    async def _render(self, text: str) -> bytes:
        process = self._process or await self._start()
        self._process = None  # unless it ends this text
        try:
            async with asyncio.timeout(self._timeout):
                blocks = await _exchange(process, text)
        except (TimeoutError, OSError, ValueError):
            raise ApiError(503, f"the text could not be rendered in {self._timeout:g} s") from None
        else:
            self._process = process
            return blocks
        finally:
            if self._process is None and process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", _MODULE, stdin=pipe, stdout=pipe, limit=_LINE_LIMIT, start_new_session=True
        )


async def _exchange(process: asyncio.subprocess.Process, text: str) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(text) + b"\n")
    await process.stdin.drain()
    blocks = await process.stdout.readline()
    if not blocks.endswith(b"\n"):
        raise ValueError("the process has ended")
    return blocks
