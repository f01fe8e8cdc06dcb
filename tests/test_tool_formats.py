"""What the parser of each format makes of a text, in any pieces."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispec.serving.chat_output.deltas import ContentDelta, ToolCallArguments, ToolCallStart
from dispec.serving.chat_output.json_text import JsonText
from dispec.serving.chat_output.tools import ToolRequest
from tests.tool_cases import BOTH, CITY, FORMATS, KÖLN, hermes, parse

ONE, TWO = [("get_weather", CITY)], [("get_weather", KÖLN), ("get-time", "{}")]
# Texts with the content and the calls that they are.
GOLDEN = [
    ("hermes", hermes("get_weather", CITY), "", ONE),
    ("hermes", f"{hermes('get_weather', KÖLN)}\n{hermes('get-time', '{}')}\n", "", TWO),
    ("hermes", f"\n\nI look.\n\n{hermes('get_weather', CITY)}", "\n\nI look.", ONE),
    ("hermes", f"{hermes('get_weather', CITY)}\nDone.", "\nDone.", ONE),
    ("hermes", f'<tool_call>{{"arguments": {CITY}, "name": "get_weather"}}</tool_call>', "", ONE),
    ("hermes", f'<tool_call>{{"name":"get_weather","id":"7","arguments":{CITY},"x":[1]}}</tool_call>', "", ONE),
    ("hermes", '<tool_call>\n{"name": "get-time"}\n</tool_call>', "", [("get-time", "{}")]),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(CITY)}}}</tool_call>', "", ONE),
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {CITY}\n</tool_call>', "", ONE),  # no last brace
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}', "", ONE),  # no tag
    ("hermes", 'a <tool_call> {"name": 1} <tool_cal', 'a <tool_call> {"name": 1} <tool_cal', []),
    ("hermes", hermes("unknown", CITY), hermes("unknown", CITY), []),
    ("hermes", f"<tool_call>no\n{hermes('get_weather', CITY)}", "<tool_call>no", ONE),
    ("json", f'{{"name": "get_weather", "arguments": {CITY}}}', "", ONE),
    ("json", f'Sure:\n{{"name": "get_weather", "arguments": {CITY}}}', "Sure:", ONE),
    ("json", 'As {"name": "get-time"}\n{"x": 1}', 'As {"name": "get-time"}\n{"x": 1}', []),
    ("json", f'So:\n```json\n{{"name": "get_weather", "arguments": {CITY}}}\n```\nDone.', "So:\nDone.", ONE),
    (
        "json",
        f'```json\n{{"name": "get_weather", "arguments": {KÖLN}}}\n{{"name": "get-time"}}\n```',
        "",
        TWO,
    ),
    ("json", '```json\n{"x": 1}\n```', '```json\n{"x": 1}\n```', []),
    (
        "json",
        f'{{"name": "get_weather", "arguments": {KÖLN}}}\n{{"name": "get-time", "arguments": {{}}}}',
        "",
        TWO,
    ),
    ("llama3_json", f'{{"name": "get_weather", "parameters": {CITY}}}', "", ONE),
    ("llama3_json", f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {CITY}}}', "", ONE),
    (
        "llama3_json",
        f'{{"name": "get_weather", "parameters": {KÖLN}}}; {{"name": "get-time", "parameters": {{}}}}',
        "",
        TWO,
    ),
    ("llama3_json", f'{{"name": "get_weather", "parameters": {CITY}}}; no', "; no", ONE),
    (
        "llama3_json",
        f'{{"type": "function", "function": {{"name": "get_weather", "parameters": {CITY}}}}}',
        "",
        ONE,
    ),
    ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {CITY}}}]', "", ONE),
    (
        "mistral",
        f'Hm.[TOOL_CALLS] [{{"name": "get_weather", "arguments": {KÖLN}, "id": "a"}}, '
        '{"name": "get-time", "arguments": {}}]',
        "Hm.",
        TWO,
    ),
    ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{KÖLN}[TOOL_CALLS]get-time[ARGS]{{}}", "", TWO),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]123456789[ARGS]{CITY}", "", ONE),
    ("mistral", f"[TOOL_CALLS]get_weather{CITY}", "", ONE),
    ("mistral", f"[TOOL_CALLS]unknown[ARGS]{CITY}", f"[TOOL_CALLS]unknown[ARGS]{CITY}", []),
    ("pythonic", '[get_weather(city="Paris")]', "", ONE),
    ("pythonic", "<|python_tag|>[get_weather(city='Paris')]\n", "", ONE),
    ("pythonic", '[get_weather(city="K\\"ö]}ln\\n", days=3), get-time()]', "", TWO),
    ("pythonic", "[get_weather(city=open('x'))]", "[get_weather(city=open('x'))]", []),
    ("pythonic", "[get_weather('Paris')] [1]", "[get_weather('Paris')] [1]", []),
    ("pythonic", "[get-time(), unknown()]", ", unknown()]", [("get-time", "{}")]),
    (
        "pythonic",
        "[get_weather(city='\\d', a=[1, -2.5, (True, None)], b={'c': false}, d=null)]",
        "",
        [("get_weather", '{"city": "\\\\d", "a": [1, -2.5, [true, null]], "b": {"c": false}, "d": null}')],
    ),
]
CASES = pytest.mark.parametrize(("name", "text", "content", "calls"), GOLDEN)


@pytest.mark.smoke
@CASES
def test_texts_are_content_and_calls(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for pieces in ([text], list(text)):
        found = parse(name, *pieces)
        assert (found.content, found.calls) == (content, calls)
        assert len(set(found.ids)) == len(calls)
        length, prefix = (9, "") if name == "mistral" else (29, "call_")
        assert all(len(call) == length and call.startswith(prefix) for call in found.ids)
        assert all(call.removeprefix(prefix).isalnum() for call in found.ids)


FRAGMENTS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        "```json",
        "```",
        '{"name": "get_weather", ',
    ),
    *('"arguments": ', '"parameters": ', CITY, KÖLN, "{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ";", "\n", " "),
    *("get_weather", "get-time(", 'city="x"', "a", hermes("get-time", "{}"), '{"name": "get-time", "arguments": {}}'),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), st.data())
def test_any_pieces_give_the_same_calls(name: str, text: str, data: st.DataObject) -> None:
    whole = parse(name, text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(name, *pieces)[:2] == whole[:2]
    if not whole.calls:
        assert whole.content == text  # nothing is lost


def test_names_and_fragments_come_as_soon_as_they_are_certain() -> None:
    parser = FORMATS["hermes"].parser(BOTH)
    assert parser.add("Let me <") == [ContentDelta("Let me")]
    assert parser.add('tool_call>{"name": "get_weather"') == []
    assert parser.add(', "arguments": ') == []
    start, first = parser.add("{")
    assert isinstance(start, ToolCallStart)
    assert (start.name, first) == ("get_weather", ToolCallArguments(0, "{"))
    assert parser.add('"ci') == [ToolCallArguments(0, '"ci')]
    assert parser.add('ty": "Pa\n}"}}</to') == [ToolCallArguments(0, 'ty": "Pa\\n}"}')]
    assert parser.add("ol_call>") == parser.finish() == []


def test_only_tools_that_may_be_called_are_calls() -> None:
    text = hermes("get-time", "{}")
    for request in (ToolRequest(BOTH.tools, "none"), ToolRequest(BOTH.tools, "required", named="get_weather")):
        assert parse("hermes", text, request=request) == (text, [], [])


@pytest.mark.parametrize(
    ("name", "piece"),
    [("json", '\n{"name": '), ("json", '\n{"arguments": '), ("hermes", "<tool_call>{")],
)
def test_text_that_may_begin_calls_is_not_scanned_again_and_again(
    name: str, piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = 0

    def counting(scanner: Any, text: str, start: int = 0) -> tuple[str, int]:
        nonlocal scanned
        scanned += len(text) - start
        return original(scanner, text, start)

    original = JsonText.add
    monkeypatch.setattr(JsonText, "add", counting)
    text = piece * 500
    assert parse(name, *[piece] * 500) == (text, [], [])
    assert scanned <= 2 * len(text)
