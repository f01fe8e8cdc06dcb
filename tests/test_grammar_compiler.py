"""Grammars of every kind, from a request's field to the texts that they allow."""

import json
import tempfile
from functools import cache
from typing import Any
from unittest.mock import Mock

import pytest
from llguidance import LLMatcher

from dispec.engine.errors import InvalidField
from dispec.engine.structured_output.grammar_compiler import GrammarCompiler
from dispec.engine.structured_output.grammar_text import grammar_text
from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from dispec.engine.structured_output.tables import Vocabulary, new_matcher
from dispec.engine.structured_output.trial_process import TrialProcess
from dispec.serving.chat_output.tools import ToolRequest
from tests.checkpoints import tiny_tokenizer
from tests.tool_cases import BOTH, FORMATS

OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
OLDER_TAG = {
    "structures": [{"begin": "<function=f>", "schema": OBJECT, "end": "</function>"}],
    "triggers": ["<function="],
}


TOKENIZER_FILE = tempfile.NamedTemporaryFile(suffix=".json")  # noqa: SIM115 (until the tests end)


@cache
def vocabulary() -> Vocabulary:
    tokenizer = tiny_tokenizer()
    tokenizer.save(TOKENIZER_FILE.name)
    return Vocabulary(TOKENIZER_FILE.name, tokenizer.get_vocab_size(), (2,))


@cache
def tables():
    return vocabulary().tables()


def allows(text: str, **structure: Any) -> bool:
    """Whether a text is a whole output."""
    matcher = new_matcher(tables(), grammar_text(StructuredOutputs(**structure)))
    assert not matcher.is_error(), matcher.get_error()
    tokens = tables().tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def refusal(**structure: Any) -> str:
    with pytest.raises(InvalidField) as refused:
        grammar_text(StructuredOutputs(**structure))
    return str(refused.value)


@pytest.mark.parametrize(
    ("structure", "allowed", "refused"),
    [
        ({"json": OBJECT}, ['{"a":"x"}', '{\n  "a": "x"\n}', '{"a":"x","b":1}'], ["{}", '{\n\n"a":"x"}', '{"a":1}']),
        ({"json": json.dumps(OBJECT), "disable_additional_properties": True}, ['{"a":"x"}'], ['{"a":"x","b":1}']),
        ({"json": OBJECT, "disable_any_whitespace": True}, ['{"a":"x"}'], ['{"a": "x"}']),
        ({"json": OBJECT, "whitespace_pattern": "  "}, ['{  "a":"x"}'], ['{ "a":"x"}']),
        ({"json_object": True}, ['{"a":[1,null]}', "{}"], ["[]", "1"]),
        ({"regex": "a/b[0-9]+"}, ["a/b12"], ["a/b", "xa/b1"]),
        ({"choice": ["a", "ab", '"q"\n\\', "é", "<|x|>"]}, ["a", "ab", '"q"\n\\', "é", "<|x|>"], ["", "b", "abb"]),
        ({"choice": ["", "x"]}, ["", "x"], ["xx"]),
        ({"grammar": 'root ::= "a" b\nb ::= [0-9]+'}, ["a12"], ["a"]),
        ({"grammar": 'start: "a" B\nB: /[0-9]+/'}, ["a12"], ["a"]),
        (
            {"structural_tag": OLDER_TAG},
            ["hello", 'hi <function=f>{"a":"x"}</function> bye', "<func"],
            ['<function=f>{"a":1}</function>', "<function=g"],
        ),
    ],
)
def test_structure_allows_its_texts_alone(structure: dict, allowed: list[str], refused: list[str]) -> None:
    for text in allowed:
        assert allows(text, **structure), text
    for text in refused:
        assert not allows(text, **structure), text


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"x/y": {"uniqueItems": True}}}, "/properties/x~1y/uniqueItems"),
        ({"items": [{"not": {}}]}, "/items/0/not"),
        ({"allOf": [{"if": {}}]}, "/allOf/0/if"),
        ({"$ref": "http://example.com/schema"}, "/$ref"),
        ({"$ref": "#/$defs/none"}, "/$ref"),
        ({"$schema": "http://example.com/dialect"}, "/$schema"),
        ({"format": "regex"}, "/format"),
        ({"minimum": 2**60}, "/minimum"),
        ({"multipleOf": -2}, "/multipleOf"),
        ({"properties": 5}, "/properties"),
    ],
)
def test_schema_is_refused_with_the_place(schema: dict, place: str) -> None:
    assert f"structured_outputs.json{place} " in refusal(json=schema)


def test_keywords_that_restrict_nothing_are_dropped() -> None:
    schema = {"title": "t", "default": 1, "uniqueItems": False, "x-guidance": {"lenient": True}, "format": "password"}
    assert allows('"x"', json={"type": "string", **schema})


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("date", "2024-02-29", "2021-02-29"),
        ("time", "10:59:59Z", "10:59:60Z"),
        ("hostname", "a-b.example", "ab--c.example"),
        ("email", "a.b@example.org", "a" * 65 + "@example.org"),
    ],
)
def test_format_is_that_of_its_standard(name: str, right: str, wrong: str) -> None:
    assert allows(f'"{right}"', json={"type": "string", "format": name})
    assert not allows(f'"{wrong}"', json={"type": "string", "format": name})


def test_listed_name_has_one_spelling() -> None:
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}}
    assert not allows('{"\\u0061":true}', json=schema)


@pytest.mark.parametrize("schema", [{"enum": ["0\x07"]}, {"type": "string", "pattern": r"^0\x07$"}])
def test_control_characters_are_escaped(schema: dict) -> None:
    assert allows('"0\\u0007"', json=schema)
    assert not allows('"0"', json=schema)


@pytest.mark.parametrize(
    ("content", "text", "wrong"),
    [
        ({"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": ["</a>", "</b>"]}, "<a>x</b>", "<a>x"),
        (
            {
                "type": "sequence",
                "elements": [
                    {"type": "or", "elements": [{"type": "regex", "pattern": "[0-9]/"}, {"type": "token", "token": 5}]},
                    {"type": "optional", "content": {"type": "const_string", "value": "z"}},
                    {"type": "repeat", "min": 1, "max": 2, "content": {"type": "const_string", "value": "w"}},
                ],
            },
            "7/zww",
            "7/zwww",
        ),
        (
            {
                "type": "tags_with_separator",
                "separator": ",",
                "tags": [{"begin": "<f>", "content": {"type": "json_schema", "json_schema": OBJECT}, "end": "</f>"}],
            },
            '<f>{"a":"1"}</f>,<f>{"a":"2"}</f>',
            '<f>{"a":"1"}</f><f>{"a":"2"}</f>',
        ),
    ],
)
def test_structural_tag_has_formats(content: dict, text: str, wrong: str) -> None:
    tag = {"type": "structural_tag", "format": content}
    assert allows(text, structural_tag=tag)
    assert not allows(wrong, structural_tag=tag)


def test_structural_tag_is_refused_by_the_format_s_name() -> None:
    assert "structural_tag/format/type is 'dispatch'" in refusal(
        structural_tag={"type": "structural_tag", "format": {"type": "dispatch"}}
    )


@pytest.mark.parametrize(
    "structure",
    [
        {"choice": []},
        {"choice": ["\ud800"]},
        {"regex": "a" * 70_000},
        {"json": OBJECT, "regex": "a"},
        {"json": '{"a": NaN}'},
        {"json": OBJECT, "whitespace_pattern": " ", "disable_any_whitespace": True},
    ],
)
def test_structure_that_cannot_be_is_refused(structure: dict) -> None:
    assert refusal(**structure).startswith("structured_outputs")


def test_hostile_grammars_end_the_trial_alone() -> None:
    """A regular expression of exponential size, and a chain of rules that overflows the stack."""
    compiler = GrammarCompiler(*vocabulary())
    try:
        patterns = " & ".join(f"/(.*a.{{{size}}}b.*)/" for size in range(1, 30))
        with pytest.raises(InvalidField, match="takes more than 1 s to compile"):
            compiler.compile(StructuredOutputs(grammar=f"start: A\nA: {patterns}"))
        rules = "\n".join(f'r{index}: "a" r{index + 1}' for index in range(3500))
        with pytest.raises(InvalidField, match="nested too deeply"):
            compiler.compile(StructuredOutputs(grammar=f'start: r0\n{rules}\nr3500: "b"'))
        with pytest.raises(InvalidField, match="refers to itself without an end"):
            compiler.compile(StructuredOutputs(json={"$ref": "#"}))
        with pytest.raises(InvalidField, match=r"json/pattern is '\(\?=a\)'"):
            compiler.compile(StructuredOutputs(json={"type": "string", "pattern": "(?=a)"}))
        assert compiler.compile(StructuredOutputs(regex="[0-9]+")) is compiler.find(StructuredOutputs(regex="[0-9]+"))
    finally:
        compiler.close()


@pytest.mark.parametrize("name", FORMATS)
def test_grammars_of_tools_are_compiled(name: str) -> None:
    structure = FORMATS[name].structure(ToolRequest(BOTH.tools, "required"))
    assert structure is not None
    assert not new_matcher(tables(), grammar_text(structure)).is_error()


def test_trial_that_ended_while_it_waited_is_replaced() -> None:
    trial = TrialProcess(vocabulary())
    try:
        assert trial.compile(grammar_text(StructuredOutputs(regex="a"))) is None
        assert trial._process is not None
        trial._process.kill()
        trial._process.wait()
        assert trial.compile(grammar_text(StructuredOutputs(regex="b"))) is None
    finally:
        trial.close()


def test_format_that_is_no_text_is_refused() -> None:
    assert refusal(json={"format": {}}) == "structured_outputs.json/format is dict, must be a text"


def test_long_forced_span_is_tokenized_a_few_times() -> None:
    text = "word " * 400
    state = GrammarCompiler(*vocabulary()).compile(StructuredOutputs(choice=(text,))).start(10_000)
    matcher = state._matcher = Mock(spec=LLMatcher, wraps=state._matcher)
    tokens = []
    while not state.is_complete:
        token_id = state.forced_token()
        assert token_id is not None
        tokens.append(token_id)
        assert state.accept(token_id)
    assert tables().decode_str(tokens) == text
    assert len(tokens) > 200
    assert matcher.compute_ff_tokens.call_count < 100
