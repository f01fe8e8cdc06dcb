"""Tools, and texts with calls of them in each format."""

from typing import Any, NamedTuple

from dispec.serving.chat_output.deltas import ContentDelta, ToolCallArguments, ToolCallStart, ToolDelta
from dispec.serving.chat_output.tool_formats import choose_tool_format
from dispec.serving.chat_output.tools import Tool, ToolFormat, ToolRequest

WEATHER = Tool(
    "get_weather",
    "The weather in a city",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/days"}, "hourly": {"type": "boolean"}},
        "required": ["city"],
        "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
    },
)
TIME = Tool("get-time")
PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
BOTH = ToolRequest((WEATHER, TIME))
CITY, KÖLN = '{"city": "Paris"}', '{"city": "K\\"ö]}ln\\n", "days": 3}'


def tool_format(name: str, template: str = "tools", vocabulary: dict[str, int] | None = None) -> ToolFormat:
    found = choose_tool_format(name, template, vocabulary or {})  # type: ignore[arg-type]
    assert found is not None
    return found


FORMATS = {name: tool_format(name) for name in ("hermes", "json", "llama3_json", "mistral", "pythonic")}
FORMATS["mistral by name"] = tool_format("mistral", "tools [ARGS]")


class Parsed(NamedTuple):
    content: str
    calls: list[tuple[str, str]]
    ids: list[str]


def joined(deltas: list[ToolDelta]) -> Parsed:
    parsed = Parsed("".join(delta.text for delta in deltas if isinstance(delta, ContentDelta)), [], [])
    for delta in deltas:
        if isinstance(delta, ToolCallStart):
            assert delta.index == len(parsed.calls)
            parsed.calls.append((delta.name, ""))
            parsed.ids.append(delta.id)
        elif isinstance(delta, ToolCallArguments):
            name, arguments = parsed.calls[delta.index]
            parsed.calls[delta.index] = (name, arguments + delta.text)
    return parsed


def deltas_of(format_name: str, *pieces: str, request: ToolRequest = BOTH) -> list[ToolDelta]:
    parser = FORMATS[format_name].parser(request)
    return [delta for piece in pieces for delta in parser.add(piece)] + parser.finish()


def parse(format_name: str, *pieces: str, request: ToolRequest = BOTH) -> Parsed:
    return joined(deltas_of(format_name, *pieces, request=request))


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
