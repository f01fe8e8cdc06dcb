"""Structured outputs keep to their grammars: schemas by keyword, generated ones, regular expressions, grammars."""

import ast
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from dispec import LLM, SamplingParams
from dispec.bench.json_schemas import CASES
from dispec.bench.random_outputs import RandomOutputs
from dispec.engine.api.outputs import RequestOutput
from dispec.engine.errors import InvalidField
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.engine.structured_output.grammar_compiler import GrammarCompiler
from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from tests.schema_checks import check_json
from tests.schema_strategies import schemas

NUM_OUTPUTS = 5  # of each case
MAX_TOKENS = 40

REGEXES = (
    r"(\+\d{1,2} )?\d{3}-\d{4}",
    r"[A-Z][a-z]+( [A-Z][a-z]+){1,2}",
    r"(yes|no|maybe)",
    r"[^\n]{1,20}\n",
    r"<b>[äöüß🙂]{2,4}</b>",
    r"#[0-9a-f]{6}",
)
CHOICES = (
    ("positive", "negative", "neutral"),
    ("a", "ab", "abc"),
    ("größer", "日本語", "🙂", 'with "quotes"\n'),
    tuple(f"option {index}" for index in range(200)),
)

NAMES = list(CASES)


def _is_arithmetic(text: str) -> bool:
    return set(text) <= set("0123456789+*() ") and isinstance(ast.parse(text, mode="eval"), ast.Expression)


LARK = """
start: sum
sum: product ("+" product)*
product: atom ("*" atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]{0,2}/
"""
GBNF = """
root ::= item+
item ::= "- " [a-z]+ "\\n"
"""
GRAMMARS: dict[str, tuple[str, Callable[[str], object]]] = {
    "lark": (LARK, _is_arithmetic),
    "gbnf": (GBNF, re.compile(r"(- [a-z]+\n)+").fullmatch),
}


def _structures() -> Iterator[tuple[str, StructuredOutputs]]:
    """Yield all cases by name."""
    for name, schema in CASES.items():
        yield f"json {name}", StructuredOutputs(json=json.dumps(schema))
    yield "json_object", StructuredOutputs(json_object=True)
    for regex in REGEXES:
        yield f"regex {regex}", StructuredOutputs(regex=regex)
    for choice in CHOICES:
        yield f"choice {choice[0]}", StructuredOutputs(choice=choice)
    for name, (grammar, _) in GRAMMARS.items():
        yield f"grammar {name}", StructuredOutputs(grammar=grammar)


@pytest.fixture(scope="module")
def outputs() -> dict[str, list[RequestOutput]]:
    """Outputs of every case at temperature 1, all in one batch."""
    llm = LLM("smollm2", device="cpu", max_num_seqs=128, max_model_len=256, kv_cache_memory="256MiB")
    prompt = llm.chat_prompt([{"role": "user", "content": "Answer with the first example that you think of."}])
    names, params = [], []
    for name, structure in _structures():
        for index in range(NUM_OUTPUTS):
            names.append(name)
            params.append(
                SamplingParams(temperature=1, seed=index, max_tokens=MAX_TOKENS, structured_outputs=structure)
            )
    found: dict[str, list[RequestOutput]] = {}
    for name, completion in zip(names, llm.generate([prompt] * len(params), params, use_tqdm=False), strict=True):
        found.setdefault(name, []).append(completion)
    return found


def texts(completions: list[RequestOutput]) -> list[str]:
    """Return the texts of outputs, all of which are whole."""
    assert len(completions) == NUM_OUTPUTS
    assert {completion.outputs[0].finish_reason for completion in completions} <= {"stop", "length"}
    return [completion.outputs[0].text for completion in completions]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_fit_the_schema(outputs: dict[str, list[RequestOutput]], name: str) -> None:
    for text in texts(outputs[f"json {name}"]):
        check_json(text, CASES[name])


def test_a_json_object_is_an_object(outputs: dict[str, list[RequestOutput]]) -> None:
    for text in texts(outputs["json_object"]):
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("regex", REGEXES)
def test_outputs_match_the_regex(outputs: dict[str, list[RequestOutput]], regex: str) -> None:
    for text in texts(outputs[f"regex {regex}"]):
        assert re.fullmatch(regex, text)


@pytest.mark.parametrize("choice", CHOICES)
def test_outputs_are_choices(outputs: dict[str, list[RequestOutput]], choice: tuple[str, ...]) -> None:
    for text in texts(outputs[f"choice {choice[0]}"]):
        assert text in choice


@pytest.mark.parametrize("name", GRAMMARS)
def test_outputs_follow_the_grammar(outputs: dict[str, list[RequestOutput]], name: str) -> None:
    _, check = GRAMMARS[name]
    for text in texts(outputs[f"grammar {name}"]):
        assert check(text)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    checkpoint = find_checkpoint("smollm2")
    path = str(Path(checkpoint.directory) / "tokenizer.json")
    return GrammarCompiler(path, checkpoint.config.vocab_size, checkpoint.eos_token_ids)


@pytest.fixture(scope="module")
def random_outputs() -> RandomOutputs:
    checkpoint = find_checkpoint("smollm2")
    return RandomOutputs(checkpoint.directory, checkpoint.config.vocab_size, checkpoint.eos_token_ids)


@pytest.mark.parametrize("name", NAMES)
def test_random_outputs_fit_the_schema(compiler: GrammarCompiler, random_outputs: RandomOutputs, name: str) -> None:
    """A model rarely leaves the beaten track; these outputs always do."""
    grammar = compiler.compile(StructuredOutputs(json=json.dumps(CASES[name])))
    rng = random.Random(name)
    for max_tokens in (60, 200) * 15:
        text = random_outputs.draw(grammar.start(max_tokens), rng, max_tokens)
        assert text is not None
        check_json(text, CASES[name])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=schemas())
def test_random_outputs_fit_generated_schemas(
    compiler: GrammarCompiler, random_outputs: RandomOutputs, schema: dict[str, object]
) -> None:
    grammar = compiler.compile(StructuredOutputs(json=json.dumps(schema)))
    rng = random.Random(0)
    for _ in range(3):
        text = random_outputs.draw(grammar.start(80), rng, 80)
        assert text is not None
        check_json(text, schema)


# Keywords that cannot be followed, and schemas that no finite document fits.
REFUSED = {
    "character without tokens": {"const": "\U00040000"},
    "name without tokens": {"properties": {"\U00040000": {"type": "null"}}},
    "endless recursion": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "endless recursion of two": {
        "$defs": {
            "a": {"type": "array", "items": {"$ref": "#/$defs/b"}, "minItems": 1},
            "b": {
                "anyOf": [
                    {"$ref": "#/$defs/a"},
                    {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]},
                ]
            },
        },
        "$ref": "#/$defs/a",
    },
    "not": {"type": "integer", "not": {"const": 3}},
    "if": {"type": "integer", "if": {"minimum": 3}, "then": {"maximum": 5}},
    "uniqueItems": {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"const": 1}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "unevaluatedProperties": {"type": "object", "properties": {"a": True}, "unevaluatedProperties": False},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "oneOf that overlaps": {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 5}]},
    "patterns that overlap": {"type": "object", "patternProperties": {"^a": {"type": "integer"}, "b$": {"minimum": 5}}},
    "unknown format": {"type": "string", "format": "made-up"},
    "look-ahead": {"type": "string", "pattern": "^(?!a)"},
    "back-reference": {"type": "string", "pattern": "^(a|b)\\1$"},
    "remote $ref": {"$ref": "http://example.com/schema.json"},
    "dangling $ref": {"$ref": "#/$defs/missing"},
    "minimum above maximum": {"type": "integer", "minimum": 5, "maximum": 4},
    "required and not allowed": {"type": "object", "required": ["b"], "additionalProperties": False},
    "false": False,
    "empty enum": {"enum": []},
    "const of another type": {"const": 3, "type": "string"},
    "unknown type": {"type": "any"},
    "no schema": [],
    "$ref to itself": {"$ref": "#"},
    "bounds beyond 2**53": {"type": "integer", "minimum": 10**20, "maximum": 10**20 + 9},
    "leniency": {"x-guidance": {"lenient": True}, "type": "null", "not": {}},
    "too many properties": {"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(1001)}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_schemas_that_are_refused(compiler: GrammarCompiler, name: str) -> None:
    schema = REFUSED[name]
    with pytest.raises(InvalidField, match=r"structured_outputs\.json"):
        compiler.compile(StructuredOutputs(json=json.dumps(schema)))
