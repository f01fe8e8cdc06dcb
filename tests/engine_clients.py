"""Engine clients with real engine processes for tests, checked for left-over requests at the end."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dispec import LLM
from dispec.engine.api.outputs import RequestOutput
from dispec.engine.process.messages import Inspection
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.step_record import StepRecord
from dispec.engine.scheduling.token_output import TokenLogprobs
from dispec.serving.client.engine_client import EngineClient, EngineObserver, State
from dispec.serving.client.process_client import ProcessClient
from dispec.serving.client.request_stream import GenerationRequest, RequestStream, RequestTiming
from tests.checkpoints import save_tiny
from tests.small_engine import OPTIONS, make, mixed_params, prompt_logprobs, random_prompts

PATIENCE = 120  # seconds after which a condition counts as never coming


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine processes on shared cores must not wait for one another's threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path, "llama")
    return path


@pytest.fixture(scope="module")
def llm(directory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the engine process has, which shares the cores with us
    yield make(directory)
    torch.set_num_threads(threads)


class Recorder(EngineObserver):
    """Records all notifications."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.firsts: list[RequestStream] = []
        self.finished: list[RequestStream] = []
        self.states: list[State] = []

    def on_step(self, record: StepRecord, finished: float) -> None:
        self.records.append(record)

    def on_first_token(self, stream: RequestStream) -> None:
        assert len(self.firsts) >= len(self.finished)
        self.firsts.append(stream)

    def on_request_finished(self, stream: RequestStream) -> None:
        self.finished.append(stream)

    def on_state(self, state: State) -> None:
        self.states.append(state)


def ended_request(
    timing: RequestTiming, num_prompt_tokens: int = 10, request_id: str = "r", **fields: Any
) -> RequestStream:
    """Return a stream as observers get it. fields: its attributes."""
    request = GenerationRequest(request_id, [1] * num_prompt_tokens, SamplingParams())
    stream = RequestStream("0", request, lambda stream: None)
    stream.timing = timing
    for name, value in fields.items():
        setattr(stream, name, value)
    return stream


def new_client(directory: Path, engine: dict[str, Any] | None = None, **settings: Any) -> ProcessClient:
    defaults = {"max_queued_requests": 1000, "max_queued_tokens": 1_000_000, "stall_seconds": 60.0}
    return ProcessClient(OPTIONS | {"model": str(directory)} | (engine or {}), **defaults | settings)


@asynccontextmanager
async def running_client(
    directory: Path, engine: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[ProcessClient]:
    """Run a client, and check that the test left nothing in an engine that still lives."""
    client = new_client(directory, engine, **settings)
    await client.start()
    try:
        yield client
        if client.state in ("ready", "draining"):
            assert_empty(await client.inspect())
        assert (client.load, client.num_running, client.num_waiting) == (0, 0, 0)
    finally:
        await client.stop()


def assert_empty(books: Inspection) -> None:
    assert books.problem is None
    assert (books.num_requests, books.num_running, books.num_waiting, books.num_used_blocks) == (0, 0, 0, 0)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        await asyncio.sleep(0.002)


def ask(client: EngineClient, prompt: list[int], params: SamplingParams, **more: Any) -> RequestStream:
    return client.submit(GenerationRequest("test", prompt, params, **more))


class Answer:
    """The merged updates of a choice."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.num_cached_tokens: int | None = None
        self.num_updates = 0


async def read(stream: RequestStream) -> list[Answer]:
    """Read to the end; the choices in their order."""
    answers = [Answer() for _ in range(stream.request.params.n)]
    async for update in stream:
        answer = answers[update.index]
        assert answer.finish_reason is None, "an update after the end"
        answer.num_updates += 1
        answer.text += update.text
        answer.token_ids += update.token_ids
        if update.logprobs is not None:
            answer.logprobs = (answer.logprobs or []) + update.logprobs
        if update.num_cached_tokens is not None:
            assert answer.num_cached_tokens is None
            assert update.index == 0
            answer.num_cached_tokens, answer.prompt_logprobs = update.num_cached_tokens, update.prompt_logprobs
        answer.finish_reason, answer.stop_reason = update.finish_reason, update.stop_reason
    assert all(answer.finish_reason is not None for answer in answers)
    return answers


async def generate(client: EngineClient, prompt: list[int], params: SamplingParams, **more: Any) -> list[Answer]:
    return await read(ask(client, prompt, params, **more))


def many_requests(llm: LLM) -> list[tuple[list[int], SamplingParams]]:
    """Return 64 requests of all kinds: with stop strings, stop tokens, logprobs, bad words and several choices."""
    prompts = random_prompts(64)
    params = mixed_params(64)
    for index in range(0, 64, 4):
        params[index] = replace(params[index], n=1 + index // 4 % 4)
    for index in range(1, 64, 6):  # a stop string that comes for certain, sometimes inside a token
        text = llm.generate([prompts[index]], params[index])[0].outputs[0].text
        params[index] = replace(params[index], stop=(text[len(text) // 2 :][:3] or "x",))
    for index in range(2, 64, 6):
        tokens = llm.generate([prompts[index]], params[index])[0].outputs[0].token_ids
        params[index] = replace(params[index], stop_token_ids=(tokens[9],))
    for index in range(3, 64, 6):
        params[index] = replace(params[index], logprobs=2, prompt_logprobs=1)
    for index in range(5, 64, 6):
        params[index] = replace(params[index], bad_words=("the", "a"), ignore_eos=False)
    return list(zip(prompts, params, strict=True))


def assert_same(expected: list[RequestOutput], found: list[list[Answer]]) -> set[tuple[Any, type]]:
    """Check that answers are those of `LLM`; return the reasons for which they ended."""
    reasons = set()
    for completion, answers in zip(expected, found, strict=True):
        for choice, answer in zip(completion.outputs, answers, strict=True):
            assert answer.token_ids == choice.token_ids
            assert answer.text == choice.text
            assert (answer.finish_reason, answer.stop_reason) == (choice.finish_reason, choice.stop_reason)
            reasons.add((answer.finish_reason, type(answer.stop_reason)))
            assert (answer.logprobs is None) == (choice.logprobs is None)
            for entry, wanted in zip(answer.logprobs or (), choice.logprobs or (), strict=True):
                assert entry.logprob == pytest.approx(wanted[entry.token_id].logprob, abs=1e-4)
                assert {entry.token_id, *(token for token, _ in entry.top)} == wanted.keys()
        of_prompt = answers[0].prompt_logprobs
        assert (of_prompt is None) == (completion.prompt_logprobs is None)
        if of_prompt is not None:
            for prompt_entry, wanted_entry in zip(of_prompt, prompt_logprobs(completion), strict=True):
                assert prompt_entry.logprob == pytest.approx(wanted_entry.logprob, abs=1e-4)
    return reasons
