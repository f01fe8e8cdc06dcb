"""Clients that ask for structure and tools, against a server of the default model and against scripted answers."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import agents
import jsonschema_rs
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.real_tokenizers import real_tokenizer
from tests.scripted_engine import ScriptedEngine, async_client, scripted_server
from tests.servers import DEFAULT_MODEL as MODEL
from tests.servers import Server, default_model_server, openai_client
from tests.tool_cases import PLACE

QUESTION = [{"role": "user", "content": "How warm is it in Paris?"}]
TEMPERATURES = pytest.mark.parametrize("temperature", [0, 1])


class Weather(BaseModel):
    """The weather of a city."""

    city: str = Field(max_length=20)
    unit: Literal["C", "F"]
    degrees: int = Field(ge=-50, le=60)
    is_raining: bool


class Place(BaseModel):
    city: str = Field(max_length=20)
    unit: Literal["C", "F"]


TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": PLACE},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with default_model_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(served: Server) -> OpenAI:
    return openai_client(served)


# OpenAI's client


@TEMPERATURES
def test_openai_parses_a_pydantic_model(client: OpenAI, temperature: float) -> None:
    completion = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=Weather, temperature=temperature, max_tokens=100
    )
    message = completion.choices[0].message
    assert isinstance(message.parsed, Weather)
    assert json.loads(message.content or "") == message.parsed.model_dump()
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, response_format=Weather, temperature=temperature, max_tokens=100
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Weather)


@TEMPERATURES
def test_openai_calls_a_tool_and_goes_on(client: OpenAI, temperature: float) -> None:
    body: dict[str, Any] = {"model": MODEL, "tools": [TOOL], "temperature": temperature, "max_tokens": 80}
    demand = {"tool_choice": "required", "parallel_tool_calls": False}  # a small model calls until it is cut
    with client.chat.completions.stream(messages=QUESTION, **demand, **body) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    for call in choice.message.tool_calls:
        assert call.function.name == "get_weather"
        jsonschema_rs.validate(PLACE, json.loads(call.function.arguments))
    results = [{"role": "tool", "tool_call_id": call.id, "content": "21"} for call in choice.message.tool_calls]
    messages: list[Any] = [*QUESTION, choice.message, *results]
    answer = client.chat.completions.create(messages=messages, tool_choice="none", **body).choices[0]
    assert answer.message.content
    assert answer.message.tool_calls is None


@TEMPERATURES
def test_a_named_tool_without_parallel_calls(client: OpenAI, temperature: float) -> None:
    other = {"type": "function", "function": {"name": "get_time"}}
    choice = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,  # type: ignore[arg-type]
        tools=[other, TOOL],  # type: ignore[list-item]
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        parallel_tool_calls=False,
        temperature=temperature,
        max_tokens=80,
        n=2,
    )
    for found in choice.choices:
        (call,) = found.message.tool_calls or ()
        assert call.function.name == "get_weather"  # type: ignore[union-attr]
        jsonschema_rs.validate(PLACE, json.loads(call.function.arguments))  # type: ignore[union-attr]


# LangChain's


@tool
def get_weather(city: str, unit: Literal["C", "F"]) -> str:
    """The weather of a city."""
    return f"21 {unit} in {city}"


def langchain(served: Server, temperature: float = 0, max_tokens: int = 100) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL,
        base_url=f"{served.url}/v1",
        api_key="none",  # type: ignore[arg-type]
        temperature=temperature,
        max_tokens=max_tokens,  # type: ignore[call-arg]
        max_retries=0,
    )


@TEMPERATURES
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(served: Server, method: Any, temperature: float) -> None:
    model = langchain(served, temperature).with_structured_output(Weather, method=method)
    assert isinstance(model.invoke("How warm is it in Paris?"), Weather)
    *_, last = model.stream("How warm is it in Paris?")
    assert isinstance(last, Weather)


@TEMPERATURES
def test_langchain_bound_tools(served: Server, temperature: float) -> None:
    bound = langchain(served, temperature).bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    message = bound.invoke("How warm is it in Paris?")
    assert isinstance(message, AIMessage)
    assert message.tool_calls
    assert not message.invalid_tool_calls
    for call in message.tool_calls:
        assert call["name"] == "get_weather"
        Place.model_validate(call["args"] | {"city": call["args"]["city"][:20]})
    whole: Any = None
    for chunk in bound.stream("How warm is it in Paris?"):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls
    assert not whole.invalid_tool_calls
    results = [ToolMessage("21 C", tool_call_id=call["id"]) for call in message.tool_calls]
    none = langchain(served, temperature, max_tokens=20).bind_tools([get_weather], tool_choice="none")
    answer = none.invoke([HumanMessage("How warm is it in Paris?"), message, *results])
    assert answer.content
    assert not answer.tool_calls


# openai-agents, and LangChain again, with answers that the test chooses


def _scripted(*outputs: str) -> ScriptedEngine:
    return ScriptedEngine(real_tokenizer("qwen3"), list(outputs))


def _call(city: str) -> str:
    arguments = json.dumps({"city": city, "unit": "C"})
    return f'<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call>'


URL = "http://testserver/v1"


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_calls_its_tool_and_answers(stream: bool) -> None:
    engine = _scripted(f"<think>\nTwo.\n</think>\n\n{_call('Paris')}\n{_call('Oslo')}", "<think>\n</think>\n\nWarm.")
    asked: list[tuple[str, str]] = []

    @agents.function_tool
    def get_weather(city: str, unit: Literal["C", "F"]) -> str:
        """The weather of a city."""
        asked.append((city, unit))
        return f"21 {unit} in {city}"

    async def run() -> Any:
        async with async_client(engine) as http:
            client = AsyncOpenAI(base_url=URL, api_key="none", http_client=http)
            model = agents.OpenAIChatCompletionsModel("tiny", client)
            agent = agents.Agent(name="Weather", instructions="Be brief.", model=model, tools=[get_weather])
            if not stream:
                return (await agents.Runner.run(agent, "How warm is it in Paris and in Oslo?")).final_output
            result = agents.Runner.run_streamed(agent, "How warm is it in Paris and in Oslo?")
            async for _ in result.stream_events():
                pass
            return result.final_output

    agents.set_tracing_disabled(True)
    assert asyncio.run(run()) == "Warm."
    assert sorted(asked) == [("Oslo", "C"), ("Paris", "C")]
    assert engine.prompt.count("<tool_response>\n21 C in ") == 2
    assert engine.prompt.index("21 C in Paris") < engine.prompt.index("21 C in Oslo")


def test_an_agent_of_the_default_model(served: Server) -> None:
    asked: list[Place] = []

    @agents.function_tool
    def get_weather(place: Place) -> str:
        """The weather of a place."""
        asked.append(place)
        return "21"

    async def run() -> Any:
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        agent = agents.Agent(
            name="Weather",
            model=agents.OpenAIChatCompletionsModel(MODEL, client),
            tools=[get_weather],
            tool_use_behavior="stop_on_first_tool",
            model_settings=agents.ModelSettings(tool_choice="required", temperature=0, max_tokens=80),
        )
        return (await agents.Runner.run(agent, "How warm is it in Paris?")).final_output

    agents.set_tracing_disabled(True)
    assert asyncio.run(run()) == "21"
    assert asked


def test_langchain_reads_scripted_calls() -> None:
    engine = _scripted(f"I look.\n{_call('Paris')}", f"I look.\n{_call('Paris')}")
    with scripted_server(engine) as http:
        model = ChatOpenAI(model="tiny", base_url=URL, api_key="none", http_client=http)  # type: ignore[arg-type]
        bound = model.bind_tools([get_weather])
        whole: Any = None
        for chunk in bound.stream("How warm is it in Paris?"):
            whole = chunk if whole is None else whole + chunk
        for message in (bound.invoke("How warm is it in Paris?"), whole):
            assert [(call["name"], call["args"]) for call in message.tool_calls] == [
                ("get_weather", {"city": "Paris", "unit": "C"})
            ]
            assert message.content.strip() == "I look."


def test_langchain_json_mode() -> None:
    engine = _scripted('<think>\nHm.\n</think>\n\n{"degrees": 21}')
    with scripted_server(engine) as http:
        model = ChatOpenAI(model="tiny", base_url=URL, api_key="none", http_client=http)  # type: ignore[arg-type]
        assert model.with_structured_output(None, method="json_mode").invoke("In JSON?") == {"degrees": 21}
    structure = engine.params.structured_outputs
    assert structure is not None
    assert structure.json_object
