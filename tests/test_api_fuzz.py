"""Bodies that no honest client sends: every one gets an answer in the usual shape, none of them an error of ours."""

import json
import os
import random
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoints import save_tiny
from tests.servers import Server, server, wait_for

CONTEXT = 96
ROUTES = ("/v1/chat/completions", "/v1/completions", "/generate", "/tokenize", "/detokenize")
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(directory, "llama", max_position_embeddings=CONTEXT)
    with server(tmp_path_factory.mktemp("server"), directory) as running:
        yield running


@pytest.fixture(autouse=True)
def as_good_as_new(served: Server) -> Iterator[None]:
    """Afterwards the same engine has nothing left to do, can still do it, and nothing went wrong unseen."""
    engine = served.engine_process()
    yield
    assert served.engine_process() == engine
    wait_for(served.is_idle, "an idle engine")
    assert served.post("/v1/completions", {"prompt": "hello", "max_tokens": 2}).status_code == 200
    assert not [line for line in served.log_lines() if line["level"] == "error"]


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = json.loads(answer.text, parse_constant=pytest.fail)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        assert len(error["message"]) < 1000


def nested(depth: int, opening: str, closing: str, core: str = "1") -> str:
    return opening * depth + core + closing * depth


WHOLE_BODIES: dict[str, bytes] = {
    "nothing": b"",
    "half": b'{"prompt": "hello"',
    "not UTF-8": b'{"prompt": "\xff\xfe", "messages": [{"role": "user", "content": "\xc3"}]}',
    "surrogates in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "a zero byte": b'{"prompt": "a\x00b"}',
    "an escaped zero": b'{"prompt": "a\\u0000b", "messages": [{"role": "user", "content": "\\u0000"}], "max_tokens":1}',
    "lone surrogate": b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\udfff"}]}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "NaN": b'{"prompt": "x", "temperature": NaN, "messages": []}',
    "Infinity": b'{"prompt": "x", "temperature": Infinity}',
    "not JSON": b"prompt=hello&max_tokens=3",
    "a number": b"1",
    "a text": b'"hello"',
    "null": b"null",
    "deep lists": nested(100_000, "[", "]").encode(),
    "deep objects": nested(100_000, '{"prompt":', "}").encode(),
    "deep where it is allowed": (
        '{"messages": [{"role": "user", "content": "x", "more": ' + nested(900, '{"a":', "}") + "}]}"
    ).encode(),
    "deep arguments": ('{"messages": [], "chat_template_kwargs": {"x": ' + nested(900, "[", "]") + "}}").encode(),
    "twice the same": b'{"prompt": "x", "prompt": 5, "max_tokens": 1, "max_tokens": "a"}',
    "many keys": json.dumps({f"k{index}": index for index in range(100_000)}).encode(),
}


@pytest.mark.parametrize("body", WHOLE_BODIES.values(), ids=WHOLE_BODIES.keys())
def test_bodies_that_are_no_requests(served: Server, body: bytes) -> None:
    for route in ROUTES:
        check(served.post(route, content=body))


def test_33_mebibytes(served: Server) -> None:
    for body in (b'{"prompt": "' + b"x" * (33 * MEBIBYTE) + b'"}', b" " * (33 * MEBIBYTE)):
        answer = served.post("/v1/completions", content=body)
        assert answer.status_code == 413
        check(answer)
    allowed = b'{"prompt": "' + b"x " * (15 * MEBIBYTE) + b'"}'
    assert served.post("/v1/completions", content=allowed).json()["error"]["code"] == "context_length_exceeded"


HUGE = [
    "1e999",
    "-1e999",
    "9" * 400,
    "-" + "9" * 400,
    "1" + "0" * 6000,
    "2147483648",
    "-9223372036854775809",
    "0.1",
    "1e30",
]
NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "n", "seed", "logprobs"]
NUMBERS += ["min_tokens", "priority", "truncate_prompt_tokens", "prompt_logprobs", "frequency_penalty", "best_of"]
NUMBERS += ["repetition_penalty", "top_logprobs"]


@pytest.mark.parametrize("value", HUGE, ids=lambda value: value[:12])
def test_numbers_beyond_all_limits(served: Server, value: str) -> None:
    for name in NUMBERS:
        text = f'{{"prompt": "x", "{name}": {value}}}'
        check(served.post("/v1/completions", content=text.encode()))
        text = f'{{"messages": [{{"role": "user", "content": "x"}}], "{name}": {value}}}'
        check(served.post("/v1/chat/completions", content=text.encode()))
    for text in (f'{{"tokens": [{value}]}}', f'{{"prompt": [{value}], "max_tokens": 1}}'):
        check(served.post("/detokenize", content=text.encode()))
        check(served.post("/v1/completions", content=text.encode()))
    for name in ("stop_token_ids", "allowed_token_ids"):
        check(served.post("/v1/completions", content=f'{{"prompt": "x", "{name}": [{value}]}}'.encode()))
    check(served.post("/v1/completions", content=f'{{"prompt": "x", "logit_bias": {{"{value}": 1}}}}'.encode()))


def _anything(rng: random.Random, depth: int = 0) -> Any:
    kinds = [None, True, rng.randint(-5, 5), rng.uniform(-2, 2), 2**31, "", "hello", "\x00", "𐍈\u202e", "<|im_end|>"]
    kinds.append("".join(rng.choices(string.printable, k=rng.randint(0, 20))))
    if depth < 3:
        kinds += [[_anything(rng, depth + 1) for _ in range(rng.randint(0, 3))] for _ in range(2)]
        kinds.append({rng.choice(["role", "content", "type", "text", "5", "x"]): _anything(rng, depth + 1)})
    return rng.choice(kinds)


FIELDS = [
    *NUMBERS,
    "model",
    "stop",
    "logit_bias",
    "stream",
    "stream_options",
    "echo",
    "tools",
    "response_format",
    "user",
]
FIELDS += [
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
    "ignore_eos",
    "chat_template_kwargs",
    "request_id",
    "suffix",
]
FIELDS += ["cache_salt", "add_generation_prompt", "continue_final_message", "return_token_ids", "skip_special_tokens"]


def test_random_values_in_fields(served: Server) -> None:
    rng = random.Random(4)
    statuses: set[int] = set()
    for number in range(300):
        body: dict[str, Any] = {"prompt": "x", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
        fields = rng.sample(FIELDS, rng.randint(1, 3))
        if number % 4 == 0:
            fields.append(rng.choice(["prompt", "messages"]))
        body |= {field: _anything(rng) for field in fields}
        for route in ROUTES[:2]:
            answer = served.post(route, content=json.dumps(body).encode())
            check(answer)
            statuses.add(answer.status_code)
    assert statuses == {200, 400, 404}


def test_malformed_headers(served: Server) -> None:
    for headers in (
        {"X-Request-ID": "x" * 10_000},
        {"X-Request-ID": ""},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Bearer"},
        {"Content-Type": "multipart/form-data"},
        {"Content-Type": "application/msgpack"},
        {"Content-Encoding": "gzip"},
        {"Accept": "text/html"},
    ):
        check(served.post("/v1/completions", content=b"\x80", headers=headers))
    for headers in (
        {"Transfer-Encoding": "chunked"},  # beside a length: the way to smuggle a second request past a proxy
        {"X-Request-ID": "a b\x7f"},
    ):
        answer = served.post("/v1/completions", content=b"\x80", headers=headers)
        check(answer)
        assert answer.status_code == 400
        assert answer.headers["x-request-id"] not in ("", headers.get("X-Request-ID"))
    for path in ("/v1/models/%2e%2e%2f", "/v1/models/%00", "/%ff", "//", "/v1//models", "/schema/assets/%2e%2e"):
        check(served.get(path))


def test_schemathesis_finds_nothing(served: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/schema/openapi.json"]
    command += ["--checks", "not_a_server_error", "--max-examples", "6", "--seed", "1", "--no-color"]
    command += ["--exclude-path", "/live", "--request-timeout", "30", "--generation-database", "none"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    # Much of what it makes is refused; some of it reaches the engine.
    answered = {line["path"] for line in served.log_lines() if line.get("status") == 200}
    assert answered >= {*ROUTES, "/v1/models"}
