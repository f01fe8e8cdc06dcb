"""Tools of Anthropic's API: texts of an engine that says what the test wants, in Qwen 3's format, to its own client."""

from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from pydantic import BaseModel
from transformers import AutoTokenizer

from tests.anthropic_client import anthropic_client
from tests.real_tokenizers import real_tokenizer, tokenizer_directory
from tests.scripted_engine import ScriptedEngine

QUESTION = {"role": "user", "content": "How warm is it in Paris and in Oslo?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "The weather of a city.", "input_schema": SCHEMA}
CLOCK = {"name": "get_time", "input_schema": {"type": "object", "properties": {}}}
TOOLS = [WEATHER, CLOCK]
THOUGHT = "<think>\nTwo cities.\n</think>\n\n"


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TWO_CALLS = "\n".join([call("get_weather", '{"city": "Øslo 😀"}'), call("get_time", "{}")])
INPUTS = [("get_weather", {"city": "Øslo 😀"}), ("get_time", {})]

Serve = Callable[..., tuple[ScriptedEngine, Anthropic]]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[ScriptedEngine, Anthropic]]:
    engine = ScriptedEngine(real_tokenizer("qwen3"))
    with anthropic_client(engine) as claude:
        yield engine, claude


@pytest.fixture
def serve(served: tuple[ScriptedEngine, Anthropic]) -> Serve:
    """Return the server, whose engine generates given outputs next."""

    def make(*outputs: str) -> tuple[ScriptedEngine, Anthropic]:
        served[0].outputs = list(outputs)
        return served

    return make


def ask(claude: Anthropic, **body: Any) -> anthropic.types.Message:
    given: dict[str, Any] = {"model": "tiny", "messages": [QUESTION], "tools": TOOLS, "max_tokens": 500}
    return claude.messages.create(**given | body)


def calls_of(message: anthropic.types.Message) -> list[tuple[str, Any]]:
    return [(block.name, block.input) for block in message.content if block.type == "tool_use"]


@pytest.mark.parametrize("text", ["", "I look."])
@pytest.mark.parametrize("thought", ["", THOUGHT])
def test_calls_are_blocks(serve: Serve, thought: str, text: str) -> None:
    _, claude = serve(*[f"{thought}{text}{TWO_CALLS}"] * 2)
    whole = ask(claude)
    with claude.messages.stream(model="tiny", messages=[QUESTION], tools=TOOLS, max_tokens=500) as stream:
        events = list(stream)
        streamed = stream.get_final_message()
    kinds = ["thinking"] * bool(thought) + ["text"] * bool(text) + ["tool_use"] * 2
    for message in (whole, streamed):
        assert [block.type for block in message.content] == kinds
        assert calls_of(message) == INPUTS
        assert message.stop_reason == "tool_use"
        ids = [block.id for block in message.content if block.type == "tool_use"]
        assert len(set(ids)) == 2
    assert [event.index for event in events if event.type == "content_block_start"] == list(range(len(kinds)))
    assert [event.index for event in events if event.type == "content_block_stop"] == list(range(len(kinds)))
    pieces = [event.partial_json for event in events if event.type == "input_json"]
    assert "".join(pieces) == '{"city": "Øslo 😀"}{}'
    assert len(pieces) > 2


def test_results_come_back_in_the_template(serve: Serve) -> None:
    engine, claude = serve(f"{THOUGHT}{TWO_CALLS}", "<think>\n\n</think>\n\nCold.")
    first = ask(claude, system="Be brief.")
    ids = [block.id for block in first.content if block.type == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": ids[0], "content": [{"type": "text", "text": "3 degrees"}]},
        {"type": "tool_result", "tool_use_id": ids[1], "content": "no clock", "is_error": True},
    ]
    messages = [QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = ask(claude, system="Be brief.", messages=messages)
    assert [(block.type, block.text) for block in second.content] == [("text", "Cold.")]
    assert second.stop_reason == "end_turn"
    functions = [
        {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city."}},
        {"type": "function", "function": {"name": "get_time"}},
    ]
    for function, tool in zip(functions, TOOLS, strict=True):
        function["function"]["parameters"] = tool["input_schema"]  # type: ignore[index]
    calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in INPUTS]
    conversation = [
        {"role": "system", "content": "Be brief."},
        QUESTION,
        {"role": "assistant", "content": "", "reasoning_content": "Two cities.", "tool_calls": calls},
        {"role": "tool", "content": "3 degrees"},
        {"role": "tool", "content": "Error: no clock"},
    ]
    reference = AutoTokenizer.from_pretrained(tokenizer_directory("qwen3"))
    expected = reference.apply_chat_template(conversation, functions, tokenize=False, add_generation_prompt=True)
    assert engine.prompt == expected
    counted = claude.messages.count_tokens(model="tiny", messages=messages, tools=TOOLS, system="Be brief.")
    assert counted.input_tokens == second.usage.input_tokens == len(reference.encode(expected))


def test_a_required_call_has_a_grammar(serve: Serve) -> None:
    engine, claude = serve(*[call("get_time", "{}")] * 4)
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_time"}):
        assert calls_of(ask(claude, tool_choice=choice)) == [("get_time", {})]
        assert engine.params.structured_outputs is not None
    ask(claude, tool_choice={"type": "auto"})
    assert engine.params.structured_outputs is None
    answer = ask(claude, tool_choice={"type": "none"})
    assert calls_of(answer) == []
    assert answer.stop_reason == "end_turn"


def test_an_input_that_is_cut(serve: Serve) -> None:
    _, claude = serve('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par')
    answer = ask(claude, max_tokens=15)
    assert answer.stop_reason == "max_tokens"


class City(BaseModel):
    name: str
    population: int


def test_output_of_a_pydantic_model(serve: Serve) -> None:
    engine, claude = serve('<think>\n\n</think>\n\n{"name": "Oslo", "population": 700000}')
    parsed = claude.messages.parse(model="tiny", messages=[QUESTION], max_tokens=500, output_format=City)
    assert parsed.parsed_output == City(name="Oslo", population=700000)
    structure = engine.params.structured_outputs
    assert structure is not None
    assert structure.kind == "json"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER | {"name": "a b"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type is 'web_search_20250305'"),
    ],
)
def test_refused_tools(serve: Serve, body: dict[str, Any], said: str) -> None:
    _, claude = serve()
    with pytest.raises(anthropic.BadRequestError) as found:
        ask(claude, **body)
    assert str(found.value.api_message).startswith(said)
    assert "function" not in str(found.value.api_message)
