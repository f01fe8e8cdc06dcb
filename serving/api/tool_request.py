"""The tools of a chat request, in OpenAI's form."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from dispec.engine.errors import InvalidField
from dispec.serving.api.protocol import ChatRequest
from dispec.serving.chat_output.tools import Tool, ToolRequest
from dispec.serving.settings import MAX_TOOL_DEPTH, MAX_TOOL_SIZE, MAX_TOOLS

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CHOICES = "none, auto, required, or an object that names a function"


def read_tools(body: ChatRequest) -> ToolRequest:
    """Return the tools that the answer may call. Raises InvalidField with the place of what is wrong."""
    if not body.tools:
        if body.tool_choice not in (None, "none"):
            raise InvalidField("tool_choice", "tool_choice is only for requests with tools")
        if body.parallel_tool_calls is not None:
            raise InvalidField("parallel_tool_calls", "parallel_tool_calls is only for requests with tools")
        return ToolRequest(choice="none")
    if len(body.tools) > MAX_TOOLS:
        raise InvalidField("tools", f"tools holds {len(body.tools)} functions, must be at most {MAX_TOOLS}")
    tools: dict[str, Tool] = {}
    for index, given in enumerate(body.tools):
        tool = _tool(given, f"tools[{index}]")
        if tool.name in tools:
            raise _wrong(f"tools[{index}].function.name", f"is {tool.name!r} a second time, must be unique")
        tools[tool.name] = tool
    return _with_choice(tools, body.tool_choice, body.parallel_tool_calls is not False)


def _tool(given: Any, where: str) -> Tool:
    _check_object(given, where)
    if given.get("type", "function") != "function":
        raise _wrong(f"{where}.type", f"is {given['type']!r:.50}, must be function")
    function = given.get("function")
    where = f"{where}.function"
    _check_object(function, where)
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong(f"{where}.name", f"is {name!r:.80}, must be 1 to 64 letters, digits, _ and -")
    if not isinstance(description, str | None):
        raise _wrong(f"{where}.description", "must be a string")
    if not isinstance(function.get("strict"), bool | None):
        raise _wrong(f"{where}.strict", "must be a boolean")
    parameters = function.get("parameters")
    tool = Tool(name, description or "", is_strict=bool(function.get("strict")))
    if not parameters:
        return tool
    _check_schema(parameters, f"{where}.parameters")
    return tool._replace(parameters=parameters)


def _check_schema(schema: Any, where: str) -> None:
    _check_object(schema, where)
    if schema.get("type", "object") != "object":
        raise _wrong(f"{where}.type", f"is {schema['type']!r:.50}, must be object")
    for name in ("properties", "$defs", "definitions"):
        if schema.get(name) is not None:
            _check_object(schema[name], f"{where}.{name}")
    required = schema.get("required")
    if required is not None and not (isinstance(required, list) and all(isinstance(name, str) for name in required)):
        raise _wrong(f"{where}.required", "must be a list of names")
    if (size := len(msgspec.json.encode(schema))) > MAX_TOOL_SIZE:
        raise _wrong(where, f"has {size} bytes, must have at most {MAX_TOOL_SIZE}")
    if (depth := _depth(schema)) > MAX_TOOL_DEPTH:
        raise _wrong(where, f"is nested {depth} levels deep, must be at most {MAX_TOOL_DEPTH}")


def _with_choice(tools: Mapping[str, Tool], choice: Any, is_parallel: bool) -> ToolRequest:
    everything = tuple(tools.values())
    if choice is None or choice == "auto":
        return ToolRequest(everything, "auto", None, is_parallel)
    if choice == "none":
        return ToolRequest(everything, "none", None, is_parallel)
    if choice == "required":
        return ToolRequest(everything, "required", None, is_parallel)
    if not isinstance(choice, dict):
        raise InvalidField("tool_choice", f"tool_choice is {choice!r:.50}, must be {_CHOICES}")
    kind = choice.get("type")
    if kind == "allowed_tools":
        return _allowed_tools(tools, choice.get("allowed_tools"), is_parallel)
    if kind != "function":
        said = f"tool_choice.type is {kind!r:.50}, must be function or allowed_tools"
        raise InvalidField("tool_choice", said)
    name = _named(tools, choice, "tool_choice")
    return ToolRequest(everything, "required", name, is_parallel)


def _allowed_tools(tools: Mapping[str, Tool], allowed: Any, is_parallel: bool) -> ToolRequest:
    """Return the request with a part of the tools, of which the answer may (auto) or must (required) call one."""
    where = "tool_choice.allowed_tools"
    _check_object(allowed, where, "tool_choice")
    mode, given = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidField("tool_choice", f"{where}.mode is {mode!r:.50}, must be auto or required")
    if not isinstance(given, list) or not given:
        raise InvalidField("tool_choice", f"{where}.tools must be a list of functions")
    names = {_named(tools, item, f"{where}.tools[{index}]") for index, item in enumerate(given)}
    return ToolRequest(tuple(tool for tool in tools.values() if tool.name in names), mode, None, is_parallel)


def _named(tools: Mapping[str, Tool], choice: Any, where: str) -> str:
    _check_object(choice, where, "tool_choice")
    _check_object(choice.get("function"), f"{where}.function", "tool_choice")
    name = choice["function"].get("name")
    if not isinstance(name, str) or name not in tools:
        raise InvalidField(
            "tool_choice", f"{where}.function.name is {name!r:.80}, must be the name of one of the tools"
        )
    return name


def _check_object(value: Any, where: str, field: str = "tools") -> None:
    if not isinstance(value, dict):
        said = "is missing" if value is None else f"is {type(value).__name__}, must be an object"
        raise InvalidField(field, f"{where} {said}")


def _depth(value: Any) -> int:
    """Return how deeply lists and objects are nested."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _wrong(where: str, what: str) -> InvalidField:
    return InvalidField("tools", f"{where} {what}")
