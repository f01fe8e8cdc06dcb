"""Clients of /v1/responses that ask for structure and tools, on a server of the default model and on given outputs."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import agents
import jsonschema
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response
from pydantic import BaseModel, Field

from tests.real_tokenizers import real_tokenizer
from tests.scripted_engine import ScriptedEngine, async_client, scripted_server
from tests.scripted_responses import PATH, Scripted, types_of
from tests.scripted_responses import QUESTION as CAPITAL
from tests.servers import DEFAULT_MODEL as MODEL
from tests.servers import Server, default_model_server, openai_client
from tests.tool_cases import PLACE

QUESTION = "How warm is it in Paris?"


class Weather(BaseModel):
    """The weather of a city."""

    city: str = Field(max_length=20)
    unit: Literal["C", "F"]
    degrees: int = Field(ge=-50, le=60)


TOOL: Any = {"type": "function", "name": "get_weather", "description": "Of a city.", "parameters": PLACE}
CLOCK: Any = {"type": "function", "name": "get_time", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with default_model_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(served: Server) -> OpenAI:
    return openai_client(served)


def test_parsing_a_pydantic_model(client: OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "input": QUESTION, "temperature": 1, "max_output_tokens": 80}
    found = client.responses.parse(text_format=Weather, **body)
    assert isinstance(found.output_parsed, Weather)
    assert json.loads(found.output_text) == found.output_parsed.model_dump()
    assert found.text is not None
    assert found.text.to_dict()["format"]["type"] == "json_schema"
    with client.responses.stream(text_format=Weather, **body) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Weather)


def test_a_tool_is_called_and_the_conversation_goes_on(client: OpenAI) -> None:
    first = client.responses.create(
        model=MODEL,
        input=QUESTION,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=80,
    )
    Response.model_validate(first.to_dict())
    (call,) = (item for item in first.output if item.type == "function_call")
    assert call.name == "get_weather"
    jsonschema.validate(json.loads(call.arguments), PLACE)
    answer = client.responses.create(
        model=MODEL,
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "21"}],
        max_output_tokens=8,
        temperature=0,
    )
    assert answer.output_text
    items: list[Any] = [{"role": "user", "content": QUESTION}, *(item.to_dict() for item in first.output)]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "21"})
    again = client.responses.create(model=MODEL, input=items, store=False, max_output_tokens=8, temperature=0)
    assert again.output_text == answer.output_text
    assert again.usage is not None
    assert answer.usage is not None
    assert again.usage.input_tokens == answer.usage.input_tokens


def test_refusals_of_schemas_name_the_field(served: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "text"}}}
    body = {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}}
    answer = served.post(PATH, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "text"
    assert answer.json()["error"]["message"].startswith("text.format")


# On given outputs in the format of Qwen 3


CALLS = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "C"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def scripted() -> Iterator[Scripted]:
    engine = ScriptedEngine(real_tokenizer("qwen3"))
    with scripted_server(engine) as http:
        yield Scripted(engine, http)


def test_calls_are_items_of_their_own(scripted: Scripted) -> None:
    output = f"<think>\nHm.\n</think>\n\nLet me see.\n{CALLS}"
    whole = scripted.create(output, tools=[TOOL, CLOCK])
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert whole.output[1].content[0].text.strip() == "Let me see."
    assert [item.name for item in whole.output[2:]] == ["get_weather", "get_time"]
    assert json.loads(whole.output[2].arguments) == {"city": "Paris", "unit": "C"}
    assert len({item.call_id for item in whole.output[2:]}) == 2
    assert whole.status == "completed"

    events = scripted.raw_events(output, tools=[TOOL, CLOCK])
    calls = [event for event in events if event.get("output_index") in (2, 3)]
    kinds = [
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert types_of(calls) == kinds * 2
    for index, item in ((2, whole.output[2]), (3, whole.output[3])):
        own = [event for event in calls if event["output_index"] == index]
        assert own[0]["item"]["name"] == item.name
        assert own[0]["item"]["arguments"] == ""
        assert "".join(event.get("delta", "") for event in own) == item.arguments
        assert own[-2]["arguments"] == own[-1]["item"]["arguments"] == item.arguments
        assert len({event.get("item_id", event.get("item", {}).get("id")) for event in own}) == 1
    assert [item["type"] for item in events[-1]["response"]["output"]] == [item.type for item in whole.output]


def test_calls_and_their_outputs_go_back_into_the_prompt(scripted: Scripted) -> None:
    first = scripted.create(f"<think>\n\n</think>\n\n{CALLS}", tools=[TOOL, CLOCK])
    calls = [item for item in first.output if item.type == "function_call"]
    outputs: list[Any] = [
        {"type": "function_call_output", "call_id": calls[0].call_id, "output": "21"},
        {
            "type": "function_call_output",
            "call_id": calls[1].call_id,
            "output": [{"type": "input_text", "text": "noon"}],
        },
    ]
    scripted.create("<think>\n\n</think>\n\nWarm.", outputs, previous_response_id=first.id, tools=[TOOL, CLOCK])
    messages: list[Any] = [
        {"role": "user", "content": CAPITAL},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ],
        },
        {"role": "tool", "tool_call_id": calls[0].call_id, "content": "21"},
        {"role": "tool", "tool_call_id": calls[1].call_id, "content": "noon"},
    ]
    prompt = scripted.engine.prompt
    scripted.engine.outputs.append("Warm.")
    tools = [
        {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
        for tool in (TOOL, CLOCK)
    ]
    scripted.client.chat.completions.create(model="tiny", messages=messages, tools=tools)  # type: ignore[arg-type]
    assert scripted.engine.prompt == prompt


def test_allowed_tools(scripted: Scripted) -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]}
    scripted.create(CALLS, tools=[TOOL, CLOCK], tool_choice=allowed)
    structure = scripted.engine.params.structured_outputs
    assert structure is not None
    assert "get_time" in str(structure.as_mapping())
    assert "get_weather" not in str(structure.as_mapping())


def test_choices_that_ask_for_no_tool_need_none(scripted: Scripted) -> None:
    for choice in ("auto", "none"):
        found = scripted.create("<think>\n\n</think>\n\nHi", tool_choice=choice, parallel_tool_calls=True)
        assert found.output_text == "Hi"


def test_json_objects(scripted: Scripted) -> None:
    scripted.create('{"a": 1}', text={"format": {"type": "json_object"}})
    structure = scripted.engine.params.structured_outputs
    assert structure is not None
    assert structure.json_object


def test_a_named_tool(scripted: Scripted) -> None:
    scripted.create(CALLS, tools=[TOOL, CLOCK], tool_choice={"type": "function", "name": "get_weather"})
    structure = scripted.engine.params.structured_outputs
    assert structure is not None
    assert "get_weather" in str(structure.as_mapping())
    assert "get_time" not in str(structure.as_mapping())


def test_an_agent_calls_its_tool() -> None:
    cities: list[str] = []
    call = '<think>\n\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    engine = ScriptedEngine(real_tokenizer("qwen3"), [call, "It has 21 degrees."] * 2)

    @agents.function_tool
    def get_weather(city: str) -> str:
        """Get the weather of a city."""
        cities.append(city)
        return "21 degrees"

    async def ask() -> list[Any]:
        async with async_client(engine) as http:
            client = AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http)
            agent = agents.Agent(
                name="Weather",
                instructions="Answer briefly.",
                model=agents.OpenAIResponsesModel("tiny", client),
                tools=[get_weather],
                model_settings=agents.ModelSettings(tool_choice="required", max_tokens=60),
            )
            config = agents.RunConfig(tracing_disabled=True)
            whole = await agents.Runner.run(agent, QUESTION, run_config=config)
            streamed = agents.Runner.run_streamed(agent, QUESTION, run_config=config)
            async for _ in streamed.stream_events():
                pass
            return [whole, streamed]

    for result in asyncio.run(ask()):
        kinds = [item.type for item in result.new_items if item.type != "reasoning_item"]
        assert kinds == ["tool_call_item", "tool_call_output_item", "message_output_item"]
        assert result.final_output == "It has 21 degrees."
    assert cities == ["Oslo", "Oslo"]
    structures = [request.params.structured_outputs for request in engine.requests]
    assert structures[0] is not None
    assert structures[0] == structures[2] != structures[1] == structures[3]  # the choice is "auto" after the call
    assert "21 degrees" in engine.prompt
