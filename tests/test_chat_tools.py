"""Tools in chats: texts of an engine that says what the test wants, in Qwen 3's format, over HTTP."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from tests.real_tokenizers import real_tokenizer, tokenizer_directory
from tests.scripted_engine import ScriptedEngine, scripted_server, thinking_tokenizer

CHATS = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "How warm is it in Paris and in Oslo?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, CLOCK]
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}

Serve = Callable[..., tuple[ScriptedEngine, httpx.Client]]


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


PARIS, OSLO = '{"city": "Paris", "unit": "C"}', '{"city": "Øslo 😀"}'
TWO_CALLS = f"{call('get_weather', PARIS)}\n{call('get_weather', OSLO)}"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[ScriptedEngine, httpx.Client]]:
    engine = ScriptedEngine(real_tokenizer("qwen3"))
    with scripted_server(engine) as http:
        yield engine, http


@pytest.fixture
def serve(served: tuple[ScriptedEngine, httpx.Client]) -> Serve:
    """Return the server, whose engine generates given outputs next."""

    def make(*outputs: str) -> tuple[ScriptedEngine, httpx.Client]:
        served[0].outputs = list(outputs)
        return served

    return make


def ask(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post(CHATS, json={"messages": MESSAGES, "tools": TOOLS} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def client_of(http: httpx.Client) -> OpenAI:
    return OpenAI(base_url=f"{http.base_url}/v1", api_key="none", http_client=http)


def calls_of(message: Any) -> list[tuple[str, str]]:
    return [(each.function.name, each.function.arguments) for each in message.tool_calls or ()]


def test_calls_are_parts_of_their_own(serve: Serve) -> None:
    _, http = serve(TWO_CALLS)
    choice = ask(http, **NO_THINKING)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["role"], message["content"]) == ("assistant", None)
    assert [each["type"] for each in message["tool_calls"]] == ["function"] * 2
    functions = [each["function"] for each in message["tool_calls"]]
    assert functions == [{"name": "get_weather", "arguments": text} for text in (PARIS, OSLO)]
    ids = [each["id"] for each in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(ids)


@pytest.mark.parametrize("text", ["", "I will look.\n"])
@pytest.mark.parametrize("thought", ["", "<think>\nTwo cities.\n</think>\n\n"])
def test_the_openai_client_accumulates_a_stream(serve: Serve, thought: str, text: str) -> None:
    engine, http = serve(*[f"{thought}{text}{TWO_CALLS}"] * 2)
    client = client_of(http)
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        completion = stream.get_final_completion()
    choice = completion.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert calls_of(choice.message) == [("get_weather", PARIS), ("get_weather", OSLO)]
    assert (choice.message.content or "").strip() == text.strip()
    assert getattr(choice.message, "reasoning_content", None) == ("Two cities." if thought else None)
    assert kinds.count("tool_calls.function.arguments.done") == 2
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS).choices[0]
    assert calls_of(whole.message) == calls_of(choice.message)
    assert (whole.message.content or "") == (choice.message.content or "")
    assert engine.prompt.endswith("<|im_start|>assistant\n")


def test_deltas_of_a_call(serve: Serve) -> None:
    _, http = serve(TWO_CALLS)
    body = {"messages": MESSAGES, "tools": TOOLS, "stream": True} | NO_THINKING
    lines = http.post(CHATS, json=body).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [each for choice in choices for each in choice["delta"].get("tool_calls", [])]
    for index in range(2):
        first, *others = [delta for delta in deltas if delta["index"] == index]
        assert first.keys() == {"index", "id", "type", "function"}
        assert (first["type"], first["function"]) == ("function", {"name": "get_weather", "arguments": ""})
        assert all(delta.keys() == {"index", "function"} for delta in others)
        assert all(delta["function"].keys() == {"arguments"} for delta in others)
        assert "".join(delta["function"]["arguments"] for delta in others) == (PARIS, OSLO)[index]
        assert len(others) > 3  # fragments come as they are generated
    assert [choice["finish_reason"] for choice in choices][-1] == "tool_calls"
    assert {choice["finish_reason"] for choice in choices[:-1]} == {None}


def test_a_conversation_with_results_is_rendered_as_transformers_does(serve: Serve) -> None:
    engine, http = serve(call("get_weather", PARIS), "It is 21 degrees.")
    client = client_of(http)
    first = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, extra_body=NO_THINKING)
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"degrees": 21}'}
    messages = [*MESSAGES, message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, extra_body=NO_THINKING)
    assert second.choices[0].message.content == "It is 21 degrees."
    assert second.choices[0].finish_reason == "stop"
    theirs = AutoTokenizer.from_pretrained(tokenizer_directory("qwen3"))
    plain = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "get_weather"}}]}
    plain["tool_calls"][0]["function"]["arguments"] = json.loads(PARIS)
    expected = theirs.apply_chat_template(
        [*MESSAGES, plain, result], tools=TOOLS, add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    assert engine.prompt == expected


def test_choices_and_logprobs(serve: Serve) -> None:
    engine, http = serve(call("get_time", "{}"), "It is warm.")
    found = ask(http, n=2, logprobs=True, return_token_ids=True, **NO_THINKING)
    first, second = found["choices"]
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "stop")
    assert (first["message"]["content"], second["message"]["content"]) == (None, "It is warm.")
    assert "tool_calls" not in second["message"]
    assert "".join(entry["token"] for entry in first["logprobs"]["content"][:-1]) == call("get_time", "{}")
    assert engine.tokenizer.decode(first["token_ids"]) == call("get_time", "{}")


def test_a_cut_call_has_the_reason_length(serve: Serve) -> None:
    _, http = serve(TWO_CALLS)
    choice = ask(http, max_tokens=12, **NO_THINKING)["choices"][0]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_demanded_call_has_a_grammar_after_the_reasoning(serve: Serve, choice: Any) -> None:
    engine, http = serve(*[call("get_weather", PARIS)] * 2)
    ids = {text: engine.tokenizer.vocabulary[text] for text in ("<think>", "</think>")}
    ask(http, tool_choice=choice)
    structure = engine.params.structured_outputs
    assert structure is not None
    assert structure.reasoning_start_token_ids == (ids["<think>"],)
    assert structure.reasoning_end_token_ids == (ids["</think>"],)
    ask(http, tool_choice=choice, **NO_THINKING)
    structure = engine.params.structured_outputs
    assert structure is not None
    assert structure.reasoning_end_token_ids == ()


def test_tool_choice_none_reads_no_calls(serve: Serve) -> None:
    engine, http = serve(call("get_time", "{}"))
    choice = ask(http, tool_choice="none", **NO_THINKING)["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", call("get_time", "{}"))
    assert engine.params.structured_outputs is None


def test_markers_that_are_special_tokens_are_read(serve: Serve) -> None:
    engine, http = serve(call("get_time", "{}") + "<|endoftext|>")
    choice = ask(http, **NO_THINKING)["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_time", "arguments": "{}"}
    assert engine.requests[-1].kept_token_ids >= {engine.tokenizer.vocabulary["<tool_call>"]}


def test_a_template_without_tools_gets_the_generic_format() -> None:
    engine = ScriptedEngine(thinking_tokenizer(), [f'{{"name": "get_weather", "arguments": {PARIS}}}'])
    with scripted_server(engine) as http:
        choice = ask(http)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": PARIS}
    assert "get_weather" in engine.prompt


def test_tokenize_counts_the_tools(serve: Serve) -> None:
    engine, http = serve("Warm.")
    ask(http)
    found = http.post("/tokenize", json={"messages": MESSAGES, "tools": TOOLS}).json()
    assert found["tokens"] == engine.requests[-1].prompt_token_ids
    answer = http.post("/tokenize", json={"prompt": "a", "tools": TOOLS})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("tools", {"tools": [{"type": "function"}]}),
        ("tools", {"tools": {"type": "function"}}),
        ("tool_choice", {"tool_choice": "sometimes"}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "unknown"}}}),
        ("tool_choice", {"tools": None, "tool_choice": "required"}),
        ("parallel_tool_calls", {"parallel_tool_calls": "no"}),
    ],
)
def test_wrong_fields_are_refused_by_name(serve: Serve, field: str, body: dict[str, Any]) -> None:
    _, http = serve("never said")
    answer = http.post(CHATS, json={"messages": MESSAGES, "tools": TOOLS} | body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert field in answer.json()["error"]["message"]


def test_tools_are_refused_where_the_parser_is_none() -> None:
    engine = ScriptedEngine(thinking_tokenizer(), ["Warm."])
    with scripted_server(engine, tool_call_parser="none") as http:
        answer = http.post(CHATS, json={"messages": MESSAGES, "tools": TOOLS})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
        assert "--tool-call-parser" in answer.json()["error"]["message"]
        assert ask(http, tools=[])["choices"][0]["message"]["content"] == "Warm."
