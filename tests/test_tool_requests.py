"""The tools of a request: what is read, and which place an error names."""

from typing import Any

import msgspec
import pytest

from dispec.engine.errors import InvalidField
from dispec.serving.api.protocol import ChatRequest
from dispec.serving.api.tool_request import read_tools
from dispec.serving.chat_output.tools import Tool, ToolRequest

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS, "strict": True}
WEATHER, TIME = {"type": "function", "function": FUNCTION}, {"type": "function", "function": {"name": "get-time"}}
TOOLS = (Tool("get_weather", "Weather", PARAMETERS, True), Tool("get-time"))
NAMED = {"type": "function", "function": {"name": "get-time"}}


def read(**fields: Any) -> ToolRequest:
    return read_tools(msgspec.convert({"messages": [], **fields}, ChatRequest))


def allowed(mode: Any, *tools: Any) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


def function(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {**FUNCTION, **changes}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ToolRequest(choice="none")),
        ({"tools": [], "tool_choice": "none"}, ToolRequest(choice="none")),
        ({"tools": [WEATHER, TIME]}, ToolRequest(TOOLS)),
        ({"tools": [WEATHER, TIME], "tool_choice": "none"}, ToolRequest(TOOLS, "none")),
        ({"tools": [WEATHER, TIME], "tool_choice": "required"}, ToolRequest(TOOLS, "required")),
        ({"tools": [WEATHER, TIME], "tool_choice": NAMED}, ToolRequest(TOOLS, "required", "get-time")),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, ToolRequest(TOOLS[:1], is_parallel=False)),
        ({"tools": [WEATHER, TIME], "tool_choice": allowed("auto", NAMED)}, ToolRequest(TOOLS[1:])),
        ({"tools": [WEATHER, TIME], "tool_choice": allowed("required", NAMED)}, ToolRequest(TOOLS[1:], "required")),
        ({"tools": [function(strict=None, parameters=None)]}, ToolRequest((Tool("get_weather", "Weather"),))),
        (
            {"tools": [function(parameters=nested(64))]},
            ToolRequest((Tool("get_weather", "Weather", nested(64), True),)),
        ),
    ],
)
def test_what_is_read(fields: dict[str, Any], expected: ToolRequest) -> None:
    assert read(**fields) == expected


@pytest.mark.parametrize(
    ("tools", "place"),
    [
        ([{"type": "custom", "custom": {}}], r"tools\[0\].type is 'custom', must be function"),
        ([WEATHER, {"type": "function"}], r"tools\[1\].function is missing"),
        ([{"type": "function", "function": []}], r"tools\[0\].function is list, must be an object"),
        ([WEATHER, TIME, function(name="a b")], r"tools\[2\].function.name is 'a b', must be 1 to 64 letters"),
        ([function(name="x" * 65)], r"tools\[0\].function.name is 'xx"),
        ([function(name="x\n")], r"tools\[0\].function.name is"),
        ([function(name=None)], r"tools\[0\].function.name is None"),
        ([WEATHER, WEATHER], r"tools\[1\].function.name is 'get_weather' a second time"),
        ([function(description=3)], r"tools\[0\].function.description must be a string"),
        ([function(strict="yes")], r"tools\[0\].function.strict must be a boolean"),
        ([function(parameters=[1])], r"tools\[0\].function.parameters is list, must be an object"),
        ([function(parameters={"type": "string"})], r"tools\[0\].function.parameters.type is 'string'"),
        ([function(parameters={"properties": [1]})], r"tools\[0\].function.parameters.properties is list"),
        ([function(parameters={"required": "a"})], r"tools\[0\].function.parameters.required must be a list"),
        ([function(parameters=nested(65))], "is nested 65 levels deep, must be at most 64"),
        ([function(parameters={"title": "x" * 65536})], "bytes, must have at most 65536"),
        ([function(name=f"f{index}") for index in range(129)], "tools holds 129 functions, must be at most 128"),
    ],
)
def test_errors_name_the_place(tools: list[Any], place: str) -> None:
    with pytest.raises(InvalidField, match=place) as error:
        read(tools=tools)
    assert error.value.field == "tools"


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"tool_choice": "auto"}, "tool_choice is only for requests with tools"),
        ({"tool_choice": NAMED}, "tool_choice is only for requests with tools"),
        ({"tools": [TIME], "tool_choice": "any"}, "tool_choice is 'any', must be none, auto, required"),
        ({"tools": [TIME], "tool_choice": {"type": "custom"}}, "tool_choice.type is 'custom', must be function"),
        ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice.function is missing"),
        (
            {"tools": [WEATHER], "tool_choice": NAMED},
            "tool_choice.function.name is 'get-time', must be the name of one of the tools",
        ),
        ({"tools": [TIME], "tool_choice": allowed("none", NAMED)}, "tool_choice.allowed_tools.mode is 'none'"),
        ({"tools": [TIME], "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools must be a list"),
        (
            {"tools": [TIME], "tool_choice": allowed("auto", NAMED, function())},
            r"tool_choice.allowed_tools.tools\[1\].function.name is 'get_weather'",
        ),
    ],
)
def test_wrong_choices(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(InvalidField, match=place) as error:
        read(**fields)
    assert error.value.field == "tool_choice"


def test_parallel_calls_need_tools() -> None:
    with pytest.raises(InvalidField, match="parallel_tool_calls is only for requests with tools"):
        read(parallel_tool_calls=True)
