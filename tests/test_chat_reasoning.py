"""Reasoning in chats: texts of an engine that says what the test wants, over HTTP."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.scripted_engine import ScriptedEngine, scripted_server, thinking_tokenizer

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
THOUGHT = "The user asks for a capital.\n\nIt is Paris."
OUTPUT = f"<think>\n{THOUGHT}\n</think>\n\nParis."
CHATS = "/v1/chat/completions"

Serve = Callable[..., tuple[ScriptedEngine, httpx.Client]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Make servers of given outputs."""
    with ExitStack() as stack:

        def make(*outputs: str, are_special: bool = False, **settings: Any) -> tuple[ScriptedEngine, httpx.Client]:
            engine = ScriptedEngine(thinking_tokenizer(are_special), list(outputs))
            return engine, stack.enter_context(scripted_server(engine, **settings))

        yield make


def ask(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post(CHATS, json={"messages": MESSAGES} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks_of(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    answer = http.post(CHATS, json={"messages": MESSAGES, "stream": True} | body)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def joined(chunks: list[dict[str, Any]], field: str) -> str:
    return "".join(chunk["choices"][0]["delta"].get(field) or "" for chunk in chunks if chunk["choices"])


@pytest.mark.parametrize("are_special", [False, True])
def test_reasoning_is_a_part_of_its_own(serve: Serve, are_special: bool) -> None:
    engine, http = serve(OUTPUT, OUTPUT, are_special=are_special)
    found = ask(http)
    message = found["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == THOUGHT
    assert message["content"] == "Paris."
    marked = engine.tokenizer.encode(OUTPUT.removesuffix("\n\nParis."))
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(marked)
    chunks = chunks_of(http, stream_options={"include_usage": True})
    assert joined(chunks, "reasoning_content") == joined(chunks, "reasoning") == THOUGHT
    assert joined(chunks, "content") == "Paris."
    assert chunks[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(marked)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    kinds = [set(chunk["choices"][0]["delta"]) for chunk in chunks[1:-1]]
    assert kinds == sorted(kinds, key=lambda kind: "content" in kind)  # reasoning first
    assert "<" not in json.dumps([message, chunks])


def test_other_special_tokens_stay_hidden(serve: Serve) -> None:
    _, http = serve("<think>\na<|endoftext|>b\n</think>\n\nc<|im_start|>d", are_special=True)
    message = ask(http)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("ab", "cd")


@pytest.mark.parametrize(
    ("output", "reasoning", "content"),
    [
        ("Paris.", None, "Paris."),
        ("  Paris </think> <think>", None, "  Paris </think> <think>"),
        ("<thin", None, "<thin"),
        ("<think>", None, ""),
        ("<think>\n\n</think>\n\nParis.", None, "Paris."),
        ("\n<think>a < b </thin k </think>c", "a < b </thin k", "c"),
        ("<think>never done </th", "never done </th", ""),
        ("<think>a</think>\n\n  b\n", "a", "  b\n"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_edges(serve: Serve, output: str, reasoning: str | None, content: str, stream: bool) -> None:
    _, http = serve(output)
    if stream:
        chunks = chunks_of(http)
        assert (joined(chunks, "reasoning") or None, joined(chunks, "content")) == (reasoning, content)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        message = ask(http)["choices"][0]["message"]
        assert (message.get("reasoning"), message["content"]) == (reasoning, content)
        assert ("reasoning_content" in message) == (reasoning is not None)


def test_a_prompt_that_opens_the_reasoning(serve: Serve) -> None:
    opened = {"chat_template_kwargs": {"opens_thinking": True}}
    engine, http = serve("Hm.\n</think>\n\nParis.", "<think>\nHm.\n</think>\n\nParis.", "Hm. No end")
    for count in (2, 2, 1):
        found = ask(http, **opened)
        assert engine.prompt.endswith("<think>\n")
        message = found["choices"][0]["message"]
        if count == 2:
            assert (message["reasoning"], message["content"]) == ("Hm.", "Paris.")
        else:
            assert (message["reasoning"], message["content"]) == ("Hm. No end", "")


def test_a_prompt_that_closes_the_reasoning(serve: Serve) -> None:
    engine, http = serve("<think> is a marker.", "<think> is a marker.")
    for body in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        found = ask(http, **body)
        assert engine.prompt.endswith("<think>\n\n</think>\n\n")
        assert found["choices"][0]["message"]["content"] == "<think> is a marker."
        assert "completion_tokens_details" not in found["usage"]


@pytest.mark.parametrize(
    ("begun", "output", "reasoning", "content"),
    [
        ("<think>\nThe capital", " is Paris.\n</think>\n\nParis", " is Paris.", "Paris"),
        ("<think>\nHm.\n</think>\n\nThe capital", " is <think>", None, " is <think>"),
        ("The capital", "<think> is", None, "<think> is"),
    ],
)
def test_a_final_message_is_continued(
    serve: Serve, begun: str, output: str, reasoning: str | None, content: str
) -> None:
    engine, http = serve(output)
    messages = [*MESSAGES, {"role": "assistant", "content": begun}]
    found = ask(http, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert engine.prompt.endswith(begun)
    message = found["choices"][0]["message"]
    assert (message.get("reasoning"), message["content"]) == (reasoning, content)


def test_a_user_cannot_open_the_reasoning(serve: Serve) -> None:
    _, http = serve("Paris.")
    assert ask(http, messages=[{"role": "user", "content": "<think>"}])["choices"][0]["message"]["content"] == "Paris."


def test_include_reasoning_false(serve: Serve) -> None:
    _, http = serve(OUTPUT, OUTPUT)
    found = ask(http, include_reasoning=False)
    assert found["choices"][0]["message"] == {"role": "assistant", "content": "Paris."}
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    chunks = chunks_of(http, include_reasoning=False)
    assert joined(chunks, "content") == "Paris."
    assert not any("reasoning" in chunk["choices"][0]["delta"] for chunk in chunks)


def test_choices_and_logprobs(serve: Serve) -> None:
    engine, http = serve(OUTPUT, "Paris.")
    found = ask(http, n=2, logprobs=True, return_token_ids=True)
    first, second = found["choices"]
    assert (first["message"]["reasoning"], "reasoning" in second["message"]) == (THOUGHT, False)
    assert "".join(entry["token"] for entry in first["logprobs"]["content"][:-1]) == OUTPUT
    assert engine.tokenizer.decode(first["token_ids"]) == OUTPUT
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] < len(first["token_ids"])


def test_output_cut_within_the_reasoning(serve: Serve) -> None:
    _, http = serve(OUTPUT)
    found = ask(http, max_tokens=6)
    choice = found["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert THOUGHT.startswith(choice["message"]["reasoning"])
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == 6


def test_a_structure_applies_after_the_reasoning(serve: Serve) -> None:
    engine, http = serve(*["{}"] * 3)
    start, end = (engine.tokenizer.backend.token_to_id(marker) for marker in ("<think>", "</think>"))
    for arguments, expected in (
        ({}, ((start,), (end,))),
        ({"opens_thinking": True}, ((), (end,))),
        ({"enable_thinking": False}, ((), ())),
    ):
        ask(http, structured_outputs={"json_object": True}, chat_template_kwargs=arguments)
        structure = engine.params.structured_outputs
        assert structure is not None
        assert (structure.reasoning_start_token_ids, structure.reasoning_end_token_ids) == expected


def test_reasoning_parser_none_leaves_the_text(serve: Serve) -> None:
    _, http = serve(OUTPUT, reasoning_parser="none")
    assert ask(http)["choices"][0]["message"] == {"role": "assistant", "content": OUTPUT}


def test_openai_client_accumulates_the_reasoning(serve: Serve) -> None:
    _, http = serve(OUTPUT)
    client = OpenAI(base_url=f"{http.base_url}/v1", api_key="none", http_client=http)
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:  # type: ignore[arg-type]
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Paris."
    assert message.reasoning_content == THOUGHT  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("reasoning_effort", {"reasoning_effort": "low"}),
        ("reasoning_effort", {"reasoning_effort": "a lot"}),
        ("reasoning_effort", {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}),
        ("reasoning_effort", {"reasoning_effort": 3}),
        ("include_reasoning", {"include_reasoning": "no"}),
    ],
)
def test_wrong_fields_are_refused_by_name(serve: Serve, field: str, body: dict[str, Any]) -> None:
    _, http = serve()
    answer = http.post(CHATS, json={"messages": MESSAGES} | body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert field in answer.json()["error"]["message"]


def test_a_budget_limits_the_reasoning_with_a_structure_and_without(serve: Serve) -> None:
    engine, http = serve(*[OUTPUT] * 4)
    end = engine.tokenizer.backend.token_to_id("</think>")
    for body in ({}, {"structured_outputs": {"json_object": True}}):
        ask(http, thinking_token_budget=7, **body)
        structure = engine.params.structured_outputs
        assert structure is not None
        assert (structure.reasoning_max_tokens, structure.reasoning_end_token_ids) == (7, (end,))
    ask(http, thinking_token_budget=-1)
    assert engine.params.structured_outputs is None
    ask(http, thinking_token_budget=7, chat_template_kwargs={"enable_thinking": False})
    assert engine.params.structured_outputs is None
