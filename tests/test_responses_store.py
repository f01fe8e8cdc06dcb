"""The responses that a server keeps, and the requests that it refuses, on an engine that generates given texts."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from dispec.engine.text.tokenizer import Tokenizer
from tests.scripted_engine import ScriptedEngine, scripted_server, thinking_tokenizer
from tests.scripted_responses import PATH, Scripted


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return thinking_tokenizer()


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Iterator[Scripted]:
    engine = ScriptedEngine(tokenizer)
    with scripted_server(engine) as http:
        yield Scripted(engine, http)


@pytest.fixture
def scripted(shared: Scripted) -> Scripted:
    shared.engine.outputs.clear()
    return shared


def test_store_false_keeps_nothing(scripted: Scripted) -> None:
    found = scripted.create("Paris", store=False)
    for call in (scripted.responses.retrieve, scripted.responses.delete, scripted.responses.cancel):
        with pytest.raises(openai.NotFoundError) as error:
            call(found.id)
        assert error.value.param == "response_id"
    with pytest.raises(openai.NotFoundError) as error:
        scripted.create("x", previous_response_id=found.id)
    assert (error.value.param, error.value.code) == ("previous_response_id", "previous_response_not_found")


def test_a_stored_response_is_retrieved_and_deleted(scripted: Scripted) -> None:
    found = scripted.create("Paris", metadata={"a": "b"})
    assert scripted.responses.retrieve(found.id).to_dict() == found.to_dict()
    with pytest.raises(openai.BadRequestError, match="not created with background"):
        scripted.responses.cancel(found.id)
    scripted.responses.delete(found.id)
    with pytest.raises(openai.NotFoundError):
        scripted.responses.retrieve(found.id)
    with pytest.raises(openai.BadRequestError, match="which no stored response has"):
        scripted.create("x", [{"type": "item_reference", "id": found.output[0].id}])


def test_the_oldest_responses_go_first(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer)
    with scripted_server(engine, max_stored_responses=2) as http:
        scripted = Scripted(engine, http)
        first, *others = [scripted.create(text) for text in ("one", "two", "three")]
        with pytest.raises(openai.NotFoundError):
            scripted.responses.retrieve(first.id)
        assert [scripted.responses.retrieve(other.id).output_text for other in others] == ["two", "three"]
        # A conversation stays whole as long as its last response.
        second = scripted.create("four", "And?", previous_response_id=others[1].id)
        scripted.create("five")
        scripted.create("six", "And?", previous_response_id=second.id)
        assert "assistant\nthree<|im_end|>" in engine.prompt
        assert "assistant\nfour<|im_end|>" in engine.prompt


def test_the_bytes_of_stored_responses_are_bounded(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer)
    with scripted_server(engine, max_stored_response_bytes=20_000) as http:
        scripted = Scripted(engine, http)
        found = [scripted.create("Paris", f"{index} " + "x" * 5000) for index in range(5)]
        stored = [scripted.http.get(f"{PATH}/{response.id}").status_code == 200 for response in found]
        assert stored == [False, False, True, True, True]
    with scripted_server(engine, max_stored_response_bytes=1000) as http:
        scripted = Scripted(engine, http)
        assert scripted.http.get(f"{PATH}/{scripted.create('Paris', 'x' * 1000).id}").status_code == 404


def test_a_server_that_stores_nothing(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer)
    with scripted_server(engine, max_stored_responses=0) as http:
        scripted = Scripted(engine, http)
        assert scripted.create("Paris").to_dict()["store"] is False
        with pytest.raises(openai.BadRequestError, match="this server stores no responses"):
            scripted.create("x", background=True)


# Refusals


def _message(**fields: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "Hi"} | fields]}


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"input": None}, "input", "input is null, must be a text or a list"),
        ({"input": []}, "input", "input is empty"),
        ({"input": ["Hi"]}, "input", 'input[0] is "Hi", must be an object'),
        (_message(role="robot"), "input", 'input[0].role is "robot", must be one of user, assistant'),
        (_message(role=None), "input", "input[0].role is missing"),
        (_message(content=None), "input", "input[0].content is missing"),
        (_message(content=7), "input", "input[0].content is 7, must be a text or a list of parts"),
        (
            _message(content=[{"type": "input_image", "image_url": "x"}]),
            "input",
            'input[0].content[0].type is "input_image", must be input_text',
        ),
        (_message(content=[{"type": "input_text"}]), "input", "input[0].content[0].text is missing"),
        ({"input": [{"type": "computer_call"}]}, "input", 'input[0].type is "computer_call", must be one of message'),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", "input[0].call_id is missing"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]},
            "input",
            'input[0].call_id is "c", which no function call before it has',
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", 'input[0].id is "x", which no stored response'),
        (
            {"input": [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}]},
            "input",
            "input[0].encrypted_content is not supported",
        ),
        ({"model": "gpt-9"}, "model", "model is 'gpt-9'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0, must be between 1 and"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "max_output_tokens=1000000 cannot be greater than"),
        ({"temperature": -1}, "temperature", "temperature is -1"),
        ({"truncation": "some"}, "truncation", "truncation is 'some', must be auto or disabled"),
        ({"include": ["x"]}, "include", "include has 'x', must be of"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs is 3, must come with include"),
        ({"top_logprobs": 21}, "top_logprobs", "top_logprobs is 21, must be between 0 and 20"),
        ({"stream_options": {}}, "stream_options", "stream_options is only for requests with stream true"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options",
            "stream_options.include_obfuscation is not supported",
        ),
        ({"background": True, "store": False}, "background", "background is true and store is false"),
        ({"metadata": {str(index): "" for index in range(17)}}, "metadata", "metadata holds 17 pairs, must be at most"),
        ({"metadata": {"a": "x" * 513}}, "metadata", "metadata.a has 513 characters, must be at most 512"),
        ({"metadata": {"a" * 65: "x"}}, "metadata", "metadata has a key of 65 characters, must be at most 64"),
        ({"metadata": {"a": 1}}, "metadata", "metadata"),
        ({"text": {"verbosity": "low"}}, "text", "text.verbosity is not supported"),
        ({"text": {"format": {}}}, "text", "text.format.type is missing"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text", "text.format.name is missing"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text", "text.format.schema is missing"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning", "reasoning.summary is not supported"),
        ({"reasoning": {"effort": "much"}}, "reasoning", "reasoning.effort is 'much'"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0].type is 'web_search', must be function: this server"),
        ({"tools": [{"name": "f"}]}, "tools", "tools[0].type is null, must be function"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0].name is None, must be 1 to 64 letters"),
        ({"tools": [TOOL | {"parameters": {"type": "array"}}]}, "tools", "tools[0].parameters.type is 'array'"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools", "tools[0].defer_loading is not supported"),
        ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice", "tool_choice is 'some', must be none, auto"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice is only for requests with tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice", "tool_choice.type is 'mcp', must be"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice", "tool_choice.name is None, must be"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "g"}]}},
            "tool_choice",
            "tool_choice.tools[0].name is 'g', must be the name of one of the tools",
        ),
        ({"prompt": {"id": "x"}}, "prompt", "prompt is not supported here"),
        ({"conversation": "c"}, "conversation", "conversation is not supported here"),
        ({"messages": [{}]}, "messages", "messages is not supported here"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options", "prompt_cache_options.prewarm is not"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_refusals_name_the_field(scripted: Scripted, body: dict[str, Any], param: str, said: str) -> None:
    answer = scripted.http.post(PATH, json={"input": "Hi"} | body)
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(said)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?stream=true", "stream"),
        ("?stream=maybe", "stream"),
        ("?starting_after=1", "starting_after"),
        ("?stream=false&starting_after=1", "starting_after"),
        ("?include=message.output_text.logprobs", "include"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=x", "after"),
    ],
)
def test_refusals_of_queries(scripted: Scripted, path: str, param: str) -> None:
    found = scripted.create("Paris")
    answer = scripted.http.get(f"{PATH}/{found.id}{path}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
