"""Tool calls in each format: what the parser makes of a text in any pieces, and what the grammar lets a model write."""

import json
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer

from dispec.engine.errors import InvalidField
from dispec.serving.chat_output.deltas import ContentDelta, ToolCallArguments, ToolCallStart, ToolDelta
from dispec.serving.chat_output.json_text import JsonText
from dispec.serving.chat_output.tool_formats import choose_tool_format
from dispec.serving.chat_output.tools import Tool, ToolFormat, ToolRequest
from tests.real_tokenizers import real_tokenizer, tokenizer_directory

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
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '{"name": "get_weather", '),
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


# Grammars

QWEN = "hermes with tokens"
WRITTEN = {
    QWEN: hermes,
    "hermes": hermes,
    "json": lambda name, arguments: f'{{"name": "{name}", "arguments": {arguments}}}',
    "llama3_json": lambda name, arguments: f'{{"name": "{name}", "parameters": {arguments}}}',
    "mistral": lambda name, arguments: f'[TOOL_CALLS][{{"name": "{name}", "arguments": {arguments}}}]',
    "mistral by name": lambda name, arguments: f"[TOOL_CALLS]{name}[ARGS]{arguments}",
    "pythonic": FORMATS["pythonic"].write_call,  # type: ignore[attr-defined]
}


@pytest.fixture(scope="module")
def vocabulary() -> LLTokenizer:
    return LLTokenizer((tokenizer_directory("qwen3") / "tokenizer.json").read_text())


def structure(name: str, request: ToolRequest) -> str:
    ids = real_tokenizer("qwen3").vocabulary
    found = (tool_format("hermes", vocabulary=ids) if name == QWEN else FORMATS[name]).structure(request)
    assert found is not None
    return str(found.grammar)


def accepts(vocabulary: LLTokenizer, grammar: str, text: str, as_tokens: bool) -> bool:
    """Return whether the grammar accepts a text; `<tool_call>` as that one token, if `as_tokens`."""
    tokenizer = real_tokenizer("qwen3")
    parts = [text] if as_tokens else list(text)
    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("name", WRITTEN)
def test_grammars_accept_right_calls_and_no_others(name: str, vocabulary: LLTokenizer) -> None:
    write, as_tokens = WRITTEN[name], name == QWEN
    right = write("get_weather", '{"city": "Köln", "days": 9}')
    strict = (WEATHER._replace(is_strict=True), TIME)
    requests = {
        "required": ToolRequest(BOTH.tools, "required"),
        "named": ToolRequest(BOTH.tools, "required", named="get_weather"),
        "single": ToolRequest(BOTH.tools, "required", is_parallel=False),
        "strict": ToolRequest(strict),
        "auto": ToolRequest(BOTH.tools, is_parallel=False),
    }
    grammars = {kind: structure(name, request) for kind, request in requests.items()}

    def accepted(text: str) -> set[str]:
        return {kind for kind, grammar in grammars.items() if accepts(vocabulary, grammar, text, as_tokens)}

    assert accepted(right) == set(requests)
    assert accepted(write("get-time", "{}")) == set(requests) - {"named"}
    assert accepted("Hello {you}\nand [all]") == {"strict", "auto"}
    assert accepted(f"Hello\n{right}") == {"strict", "auto"}
    wrong = ('{"city": 3}', '{"days": 3}', '{"city": "Paris", "days": 10}', '{"city": "Paris", "x": 1}')
    for text in (write("unknown", CITY), *(write("get_weather", arguments) for arguments in wrong)):
        # Without a call of a known tool, a text is a text.
        free = {"strict", "auto"} if name == "pythonic" and "unknown" in text else set()
        assert accepted(text) == free, text


def test_grammars_bound_the_number_of_calls(vocabulary: LLTokenizer) -> None:
    call, grammar = WRITTEN["json"]("get-time", "{}"), structure("json", ToolRequest(BOTH.tools, "required"))
    assert accepts(vocabulary, grammar, "\n".join([call] * 16), False)
    assert not accepts(vocabulary, grammar, "\n".join([call] * 17), False)


def test_a_marker_that_is_a_token_is_not_spelled_out(vocabulary: LLTokenizer) -> None:
    text, grammar = hermes("get_weather", CITY), structure(QWEN, ToolRequest(BOTH.tools, "required"))
    assert accepts(vocabulary, grammar, text, as_tokens=True)
    assert not accepts(vocabulary, grammar, text, as_tokens=False)
    strict = structure(QWEN, ToolRequest((WEATHER._replace(is_strict=True),)))
    assert not accepts(vocabulary, strict, "A <tool_call>", as_tokens=False)


def test_free_text_has_no_grammar() -> None:
    for tools in (FORMATS[name] for name in FORMATS):
        assert tools.structure(BOTH) is None
        assert tools.structure(ToolRequest(BOTH.tools, "none")) is None


UNSUPPORTED = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]}


def test_keywords_without_support_are_refused_only_if_the_tool_is_strict(vocabulary: LLTokenizer) -> None:
    for is_strict in (False, True):
        grammar = structure("json", ToolRequest((Tool("f", "", UNSUPPORTED, is_strict),), "required"))
        matcher = LLMatcher(vocabulary, grammar, log_level=0)
        assert matcher.is_error() == is_strict
    with pytest.raises(InvalidField, match="parameters of 'f' have 'a-b'"):
        FORMATS["pythonic"].structure(ToolRequest((Tool("f", "", {"properties": {"a-b": {}}}, True),)))


BYTES = LLTokenizer("byte")
NAMES = st.sampled_from(["a", "b", "c"])
VALUES = st.sampled_from([{"type": "string"}, {"type": "integer"}, {"enum": ["x", None, True]}, {"const": 'é"\\'}])


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(NAMES, VALUES), st.sets(NAMES), st.sampled_from(sorted(FORMATS)), st.randoms())
def test_random_walks_through_grammars_are_valid_calls(
    properties: dict[str, Any], required: set[str], name: str, random: Any
) -> None:
    schema = {"type": "object", "properties": properties, "required": sorted(required & set(properties))}
    request = ToolRequest((Tool("f", "", schema, True), TIME), "required")
    matcher = LLMatcher(BYTES, structure(name, request), log_level=0)
    written = bytearray()
    while not matcher.is_stopped() and len(written) < 400:
        mask = matcher.compute_bitmask()
        allowed = [byte for byte in range(128) if mask[byte // 8] >> (byte % 8) & 1]
        if not allowed or (matcher.is_accepting() and random.random() < 0.5):
            break
        closing = [byte for byte in allowed if chr(byte) in '"})]']
        byte = random.choice(closing if closing and random.random() < 0.7 else allowed)
        assert matcher.consume_tokens([byte])
        written.append(byte)
    if matcher.is_accepting():
        found = parse(name, written.decode(), request=request)
        assert found.calls
        assert found.content == ""
        for function, arguments in found.calls:
            Draft202012Validator(schema if function == "f" else {}).validate(json.loads(arguments))
