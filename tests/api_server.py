"""A server on a tiny checkpoint, OpenAI's client to talk to it, and the engine that its answers are compared with.

A plugin of the tests that use it, so that they share one server. PYTEST_DONT_REWRITE: they import it before it is one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from dispec import LLM
from tests.checkpoints import save_tiny
from tests.servers import Server, server, wait_for
from tests.small_engine import make

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
CONTEXT = 512

PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.2, "seed": 2, "top_p": 0.7},
    {"temperature": 1.2, "seed": 2, "top_k": 5, "min_p": 0.02},
    {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0, "logit_bias": {"70": 50, "71": -100}},
    {"temperature": 0, "allowed_token_ids": [40, 41, 42]},
    {"temperature": 0, "bad_words": ["a", "the"]},
    {"temperature": 0, "stop_token_ids": list(range(40, 200)), "min_tokens": 3},
    {"temperature": 0, "ignore_eos": True, "skip_special_tokens": False},
    {"temperature": 1.0, "seed": -5, "stop": [" ", "e", "\n", "a"], "include_stop_str_in_output": True},
    {"temperature": 1.0, "seed": 9, "n": 4},
]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(directory, "qwen3", max_position_embeddings=CONTEXT)
    return directory


@pytest.fixture(scope="session")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("server"), model) as running:
        yield running


@pytest.fixture
def client(served: Server) -> Iterator[OpenAI]:
    """A client; the engine is idle again after the test."""
    with OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client
    wait_for(served.is_idle, "an idle engine")


@pytest.fixture(scope="session")
def llm(model: Path) -> LLM:
    return make(model)


def complete(client: OpenAI, prompt: Any, **body: Any) -> openai.types.Completion:
    names = set(openai.types.completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    extra = {name: body.pop(name) for name in list(body) if name not in names}
    return client.completions.create(model="tiny", prompt=prompt, extra_body=extra, **body)


def chat(client: OpenAI, messages: list[Any] | None = None, **body: Any) -> Any:
    names = set(openai.types.chat.completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    extra = {name: body.pop(name) for name in list(body) if name not in names}
    return client.chat.completions.create(model="tiny", messages=messages or MESSAGES, extra_body=extra, **body)
