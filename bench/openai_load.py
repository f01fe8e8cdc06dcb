"""Load on a server that speaks OpenAI's completions: requests sent, and when the pieces of each answer came."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.workload import random_tokens


@dataclass(frozen=True)
class Load:
    """What is asked of a server. Exactly one of `rate` (requests per second) and `concurrency` is set."""

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
    """How one request went, in seconds of `time.perf_counter`. chunks: when each piece of text came."""

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


async def sse_data(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of each server-sent event."""
    rest = b""
    async for received in response.aiter_raw():
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Answer:
    """Send a request and note when its pieces come. Whatever goes wrong is the answer's `error`."""
    answer = Answer(arrival=time.perf_counter())
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code == 200:
                await _read(response, answer)
            else:
                text = (await response.aread()).decode(errors="replace")
                answer.error = f"{response.status_code} {text[:120]}"
    except (httpx.HTTPError, ValueError, KeyError) as error:  # the connection, or what came over it
        answer.error = type(error).__name__
    answer.finished = time.perf_counter()
    return answer


async def _read(response: httpx.Response, answer: Answer) -> None:
    answer.error = "broke off before [DONE]"
    async for data in sse_data(response):
        if data == b"[DONE]":
            answer.error = None if answer.chunks else "no text"
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            answer.error = f"in the stream: {chunk['error'].get('message', '')[:120]}"
            return
        if chunk.get("usage"):
            answer.num_tokens = chunk["usage"]["completion_tokens"]
        if any(choice.get("text") or choice.get("delta", {}).get("content") for choice in chunk["choices"]):
            answer.chunks.append(time.perf_counter())
    answer.num_tokens = answer.num_tokens or len(answer.chunks)


async def run_load(
    client: httpx.AsyncClient, load: Load, model: str, seed: int, on_answer: Callable[[], object] = lambda: None
) -> list[Answer]:
    """Put the load on the server; one answer for each request."""
    path = "/v1/chat/completions" if load.chat else "/v1/completions"
    rng = random.Random(seed)
    limit = asyncio.Semaphore(load.concurrency or load.num_requests)

    async def one(body: dict[str, Any]) -> Answer:
        try:
            return await ask(client, path, body)
        finally:
            limit.release()
            on_answer()

    tasks = []
    start, due = time.perf_counter(), 0.0
    for prompt in load.prompts(seed):
        if load.rate is not None:
            due += rng.expovariate(load.rate)
            await asyncio.sleep(start + due - time.perf_counter())
        await limit.acquire()
        tasks.append(asyncio.create_task(one(load.body(prompt, model))))
    return await asyncio.gather(*tasks)
