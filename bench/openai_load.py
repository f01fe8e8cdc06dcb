"""Load on a server with OpenAI's completions API: sends requests, and records when the pieces of each answer arrive.

Pieces are stored with their time and parsed when all answers have arrived: on a machine with few cores, parsing JSON
during the load would take time from the server.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from dispec.bench.workload import random_tokens


@dataclass(frozen=True)
class Load:
    """The requests of a run. Exactly one of `rate` (requests per second) and `concurrency` is set."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    rate: float | None = None
    concurrency: int | None = None
    chat: bool = False
    ignore_eos: bool = True

    def prompts(self, seed: int) -> list[list[int]]:
        return [
            random_tokens(self.prompt_tokens, self.vocab_size, f"{seed} {self.rate} {self.concurrency} {index}")
            for index in range(self.num_requests)
        ]

    def body(self, prompt: list[int], model: str) -> dict[str, Any]:
        body: dict[str, Any] = {"model": model, "max_tokens": self.output_tokens, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.chat:  # words, about one token each
            return body | {"messages": [{"role": "user", "content": " ".join(map(str, prompt))}]}
        return body | {"prompt": prompt}


@dataclass
class Answer:
    """Times of one request, in seconds of `time.perf_counter`. chunks: arrival of each piece of text."""

    arrival: float
    chunks: list[float] = field(default_factory=list)
    finished: float = 0.0
    num_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.arrival

    @property
    def e2e(self) -> float:
        return self.finished - self.arrival

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        return (self.chunks[-1] - self.chunks[0]) / max(1, self.num_tokens - 1)


class Connection(asyncio.Protocol):
    """A connection for one request at a time, and the last answer: `status`, and `pieces` with their times."""

    def __init__(self) -> None:
        self.status = 0
        self.pieces: list[tuple[float, bytes]] = []
        self.is_open = False
        self._end: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    async def ask(self, request: bytes) -> None:
        """Send a request and wait for its answer. Raises ConnectionError, or httptools.HttpParserError."""
        self.status, self.pieces = 0, []
        self._parser = httptools.HttpResponseParser(self)
        self._end = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._end

    def close(self) -> None:
        self.is_open = False
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._stop(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(ConnectionError("the server closed the connection"))

    def _stop(self, error: Exception) -> None:
        self.is_open = False
        if self._end is not None and not self._end.done():
            self._end.set_exception(error)

    # Called by the parser

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def on_message_complete(self) -> None:
        self.is_open = self.is_open and self._parser.should_keep_alive()
        if self._end is not None and not self._end.done():
            self._end.set_result(None)


class Client:
    """A pool of kept-alive connections to a server, as many as there are concurrent requests."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        self._is_secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._is_secure else 80)
        self._prefix = parts.path.rstrip("/")
        self._headers = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n"
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[Connection] = []

    async def ask(self, path: str, body: bytes) -> tuple[Answer, int, list[tuple[float, bytes]]]:
        """Post a request; return its unparsed answer, status and pieces."""
        head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        answer = Answer(arrival=time.perf_counter())
        connection = None
        try:
            connection = await self._connection()
            await connection.ask(head.encode() + body)
        except (OSError, httptools.HttpParserError) as error:
            answer.error = "ConnectError" if connection is None else type(error).__name__
        answer.finished = time.perf_counter()
        if connection is None:
            return answer, 0, []
        if connection.is_open:
            self._idle.append(connection)
        return answer, connection.status, connection.pieces

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _connection(self) -> Connection:
        while self._idle:
            if (idle := self._idle.pop()).is_open:
                return idle
        _, made = await asyncio.get_running_loop().create_connection(
            Connection, self._host, self._port, ssl=self._is_secure or None
        )
        return made


def named_urls(urls: list[str]) -> dict[str, str]:
    """Return the URLs of servers by name, of NAME=URL or of a URL alone. Raises ValueError if two have one name."""
    named = {}
    for given in urls:
        name, url = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", given).groups(default="server")  # type: ignore[union-attr]
        if name in named:
            raise ValueError(f"--url names {name!r} twice: give each server as NAME=URL")
        named[name] = url.rstrip("/").removesuffix("/v1")
    return named


def read(answer: Answer, status: int, pieces: list[tuple[float, bytes]]) -> Answer:
    """Parse the pieces into times of text and the number of tokens, or an error."""
    if status != 200:
        answer.error = answer.error or f"{status} {b''.join(data for _, data in pieces).decode(errors='replace')[:120]}"
        return answer
    try:
        error = _read_events(answer, pieces)
    except (ValueError, KeyError) as unreadable:
        error = type(unreadable).__name__
    answer.error = answer.error or error
    return answer


def _read_events(answer: Answer, pieces: list[tuple[float, bytes]]) -> str | None:
    """Parse the server-sent events; return what is wrong with them, or None."""
    rest, is_done = b"", False
    for moment, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            said = line[5:].strip()
            if said == b"[DONE]":
                is_done = True
                continue
            chunk = json.loads(said)
            if "error" in chunk:
                return f"in the stream: {chunk['error'].get('message', '')[:120]}"
            if chunk.get("usage"):
                answer.num_tokens = chunk["usage"]["completion_tokens"]
            if any(choice.get("text") or choice.get("delta", {}).get("content") for choice in chunk["choices"]):
                answer.chunks.append(moment)
    answer.num_tokens = answer.num_tokens or len(answer.chunks)
    if not is_done:
        return "ended before [DONE]"
    return None if answer.chunks else "no text"


async def run_load(
    client: Client,
    load: Load,
    model: str,
    seed: int,
    on_answer: Callable[[], object] = lambda: None,
    is_over: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """Put the load on the server and return one answer for each request, with `error` where it failed.

    is_over: whether to send no further request.
    """
    path = "/v1/chat/completions" if load.chat else "/v1/completions"
    bodies = [json.dumps(load.body(prompt, model)).encode() for prompt in load.prompts(seed)]
    rng = random.Random(seed)
    limit = asyncio.Semaphore(load.concurrency or load.num_requests)

    async def one(body: bytes) -> tuple[Answer, int, list[tuple[float, bytes]]]:
        try:
            return await client.ask(path, body)
        finally:
            limit.release()
            on_answer()

    tasks = []
    start, due = time.perf_counter(), 0.0
    for body in bodies:
        if load.rate is not None:
            due += rng.expovariate(load.rate)
            await asyncio.sleep(start + due - time.perf_counter())
        await limit.acquire()
        if is_over():
            break
        tasks.append(asyncio.create_task(one(body)))
    return [read(*found) for found in await asyncio.gather(*tasks)]
