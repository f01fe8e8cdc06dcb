"""Hostile grammars at a running server: each is refused, and other streams go on."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.checkpoints import save_tiny, save_tokenizer
from tests.running_server import Server, serving

NESTED = '{"items":' * 10_000 + "{}" + "}" * 10_000
HOSTILE = {
    "patterns without end": {"grammar": "start: A\nA: " + " & ".join(f"/(.*a.{{{n}}}b.*)/" for n in range(1, 30))},
    "chain of rules": {
        "grammar": "start: r0\n" + "\n".join(f'r{n}: "a" r{n + 1}' for n in range(3500)) + '\nr3500: "b"'
    },
    "deep schema": {"json": NESTED},
    "large schema": {"json": {"enum": ["x" * 2**20]}},
    "no value": {"json": {"$ref": "#"}},
    "another host": {"json": {"$ref": "http://127.0.0.1/schema"}},
    "no output": {"grammar": 'start: a\na: a "x"'},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("model")
    save_tiny(directory, "llama")
    save_tokenizer(directory)
    with serving(Path(directory)) as server:
        yield server


def test_hostile_grammars_are_refused_while_a_stream_goes_on(server: Server) -> None:
    expected = server.completion("the same text", 200).json()["choices"][0]["text"]
    with ThreadPoolExecutor(1) as threads:
        streams = [threads.submit(server.completion, "the same text", 200) for _ in range(8)]
        for name, structure in HOSTILE.items():
            answer = server.completion("x", 5, structured_outputs=structure, ignore_eos=False)
            assert answer.status_code == 400, name
            assert answer.json()["error"]["param"] == "structured_outputs", name
        for stream in streams:
            assert stream.result().json()["choices"][0]["text"] == expected
    answer = server.completion("x", 20, structured_outputs={"json": {"enum": ["a", "b"]}}, ignore_eos=False)
    assert json.loads(answer.json()["choices"][0]["text"]) in ("a", "b")
