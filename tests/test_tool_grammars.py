"""What the grammar of each format lets a model write."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer

from dispec.engine.errors import InvalidField
from dispec.serving.chat_output.tools import Tool, ToolRequest
from tests.real_tokenizers import real_tokenizer, tokenizer_directory
from tests.tool_cases import BOTH, CITY, FORMATS, TIME, WEATHER, hermes, parse, tool_format

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
    grammar = structure("json", ToolRequest((Tool("f", "", UNSUPPORTED),), "required"))
    assert not LLMatcher(vocabulary, grammar, log_level=0).is_error()
    with pytest.raises(
        InvalidField, match="/properties/a/uniqueItems of the parameters of 'f' is a keyword that cannot"
    ):
        structure("json", ToolRequest((Tool("f", "", UNSUPPORTED, True),), "required"))
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
