import json
import random
import re

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, grammar_from

from dispec.engine.structured_output.closing_plan import ClosingPlanner
from tests.checkpoints import tiny_tokenizer
from tests.vocabularies import published_tokenizer

TOKENIZER = LLTokenizer(tiny_tokenizer().to_str(), eos_token=2)
PLANNER = ClosingPlanner(TOKENIZER, TOKENIZER.vocab_size)


def matcher_of(kind, grammar, tokenizer=TOKENIZER) -> LLMatcher:
    grammar = json.dumps(grammar) if kind == "json_schema" else grammar
    matcher = LLMatcher(tokenizer, grammar_from(kind, grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def allowed_tokens(matcher: LLMatcher) -> list[int]:
    return np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").nonzero()[0].tolist()


def random_token(matcher: LLMatcher, rng: random.Random, tokenizer: LLTokenizer) -> int:
    """An allowed token. Half of the time it begins with punctuation if it may, so that the output gets structure."""
    tokens = allowed_tokens(matcher)
    if rng.random() < 0.5:
        structure = [token for token in tokens if tokenizer.decode_bytes([token])[:1] in b'"{}[]:,()<>']
        tokens = structure or tokens
    return rng.choice(tokens)


def walk(matcher, rng, max_tokens, planner=PLANNER, tokenizer=TOKENIZER, choose=random_token) -> str:
    """Return an output of random tokens that the plan closes in time."""
    matcher = matcher.deep_copy()
    plan = planner.plan(matcher, max_tokens)
    assert plan is not None
    output: list[int] = []
    while not matcher.is_stopped():
        token = choose(matcher, rng, tokenizer)
        if token in tokenizer.eos_tokens:
            break
        assert matcher.consume_token(token)
        updated = planner.update(matcher, token, plan, max_tokens - len(output) - 1)
        if updated is None:
            matcher.rollback(1)
            assert matcher.consume_tokens(list(plan))
            output.extend(plan)
            break
        output.append(token)
        plan = updated
    assert matcher.is_accepting()
    assert len(output) <= max_tokens
    return tokenizer.decode_bytes(output).decode()


def check_schema(schema, rng, max_tokens=40, **walking):
    matcher = matcher_of("json_schema", schema, **({"tokenizer": walking["tokenizer"]} if walking else {}))
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    first = walking.get("planner", PLANNER).plan(matcher, 1000)
    assert first is not None
    for budget in range(len(first), max(len(first), max_tokens) + 1):
        text = walk(matcher, rng, budget, **walking)
        # llguidance allows exponents beyond those of floats.
        value = json.loads(text, parse_float=lambda number: min(max(float(number), -1e300), 1e300))
        assert validator.is_valid(value), text


def closed_object(**properties):
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if not name.startswith("optional")],
        "additionalProperties": False,
    }


STRING, INTEGER = {"type": "string"}, {"type": "integer"}
NODE = {"$ref": "#/$defs/node"}
LEAF = closed_object(leaf=INTEGER)
# Each with the shortest text that the schema allows.
SHORTEST = {
    "any object": ({"type": "object"}, "{}"),
    "required": (closed_object(name=STRING, age=INTEGER), '{"name":"","age":0}'),
    "nested": (
        closed_object(outer=closed_object(inner=STRING, numbers={"type": "array", "items": INTEGER, "minItems": 3})),
        '{"outer":{"inner":"","numbers":[0,0,0]}}',
    ),
    "optional before": (
        closed_object(**{f"optional{i}": STRING for i in range(12)}, last=INTEGER),
        '{"last":0}',
    ),
    "optional between": (
        closed_object(**{f"{name}{i}": INTEGER for i in range(5) for name in ("optional", "required_property")}),
        json.dumps({f"required_property{i}": 0 for i in range(5)}, separators=(",", ":")),
    ),
    "many required": (
        closed_object(**{f"p{i}": [STRING, INTEGER, {"enum": ["one", "three"]}][i % 3] for i in range(24)}),
        json.dumps({f"p{i}": ["", 0, "one"][i % 3] for i in range(24)}, separators=(",", ":")),
    ),
    "min items": ({"type": "array", "minItems": 12}, json.dumps([0] * 12, separators=(",", ":"))),
    "min length": ({"type": "string", "minLength": 9}, '"xxxxxxxxx"'),
    "pattern": (closed_object(code={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}), '{"code":"AAA-0000"}'),
    "pattern with ways": ({"type": "string", "pattern": "^(aaaaaaaaaaaa|bbbb|cc)x$"}, '"ccx"'),
    "pattern with an end": ({"type": "string", "pattern": "^[a-z]*bcd$"}, '"bcd"'),
    "date": ({"type": "string", "format": "date"}, '"2024-01-01"'),
    "date-time": ({"type": "string", "format": "date-time"}, '"2024-01-01T00:00:00Z"'),
    "uuid": ({"type": "string", "format": "uuid"}, '"00000000-0000-0000-0000-000000000000"'),
    "ipv4": ({"type": "string", "format": "ipv4"}, '"0.0.0.0"'),
    "bounds": (closed_object(n={"type": "integer", "minimum": 1000, "maximum": 1010}), '{"n":1000}'),
    "number": (closed_object(n={"type": "number", "exclusiveMinimum": 0.5, "maximum": 0.75}), '{"n":0.6}'),
    "null or large": (
        closed_object(c={"anyOf": [closed_object(**{f"p{i}": STRING for i in range(20)}), {"type": "null"}]}),
        '{"c":null}',
    ),
    "large or small": (
        {"anyOf": [closed_object(a=STRING, b={"type": "array", "minItems": 5}), closed_object(v=INTEGER)]},
        '{"v":0}',
    ),
    "tree": (
        {**NODE, "$defs": {"node": {"anyOf": [closed_object(left=NODE, right=NODE), LEAF]}}},
        '{"leaf":0}',
    ),
    "list": (
        {**NODE, "$defs": {"node": closed_object(value=INTEGER, next={"anyOf": [{"type": "null"}, NODE]})}},
        '{"value":0,"next":null}',
    ),
    "enum": ({"enum": [f"value number {i}" for i in range(30)] + ["x"]}, '"x"'),
    "const": ({"const": {"a": [1, 2, {"b": "c"}]}}, '{"a":[1,2,{"b":"c"}]}'),
}


@pytest.mark.parametrize("name", SHORTEST)
def test_first_plans_are_short(name):
    schema, shortest = SHORTEST[name]
    matcher = matcher_of("json_schema", schema)
    plan = PLANNER.plan(matcher, 1000)
    assert plan is not None
    assert len(plan) <= 1.5 * len(TOKENIZER.tokenize_str(shortest)), TOKENIZER.decode_str(list(plan))
    assert jsonschema_rs.is_valid(schema, json.loads(TOKENIZER.decode_str(list(plan))))


@pytest.mark.parametrize("name", SHORTEST)
def test_cut_documents_are_valid(name):
    check_schema(SHORTEST[name][0], random.Random(name), 30)


def schemas() -> st.SearchStrategy:
    """Schemas that allow a value: bounds are in order."""
    strings = st.one_of(
        st.builds(
            lambda low, more: {**STRING, "minLength": low, "maxLength": low + more},
            st.integers(0, 12),
            st.integers(0, 5),
        ),
        st.sampled_from(["^[a-z]{2,5}$", "^(a|bb|ccc)+$", "^[^ ]+@[a-z]+\\.com$", "^\\d{3}-\\d{2}$", "^é+ü$"]).map(
            lambda pattern: {**STRING, "pattern": pattern}
        ),
        st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "email"]).map(
            lambda name: {**STRING, "format": name}
        ),
        st.just(STRING),
    )
    integers = st.builds(
        lambda low, more: {**INTEGER, "minimum": low, "maximum": low + more},
        st.integers(-2000, 2000),
        st.integers(0, 3000),
    )
    leaves = st.one_of(
        strings,
        integers,
        st.sampled_from([INTEGER, {"type": "number"}, {"type": "boolean"}, {"type": "null"}, {}, {"type": "object"}]),
        st.lists(st.one_of(st.text(max_size=6), st.integers(), st.booleans()), min_size=1, max_size=5).map(
            lambda values: {"enum": values}
        ),
    )

    def containers(inner: st.SearchStrategy) -> st.SearchStrategy:
        names = st.text("abcdé_- ", min_size=1, max_size=8)
        arrays = st.builds(
            lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
            inner,
            st.integers(0, 4),
            st.integers(0, 3),
        )
        objects = st.builds(
            lambda properties, skip, additional: {
                "type": "object",
                "properties": properties,
                "required": list(properties)[skip:],
                "additionalProperties": additional,
            },
            st.dictionaries(names, inner, max_size=5),
            st.integers(0, 3),
            st.booleans(),
        )
        return st.one_of(arrays, objects, st.lists(inner, min_size=1, max_size=3).map(lambda ways: {"anyOf": ways}))

    return st.recursive(leaves, containers, max_leaves=6)


@settings(deadline=None, max_examples=40)
@given(schemas(), st.integers(0, 2**32))
def test_cut_documents_of_any_schema_are_valid(schema, seed):
    check_schema(schema, random.Random(seed), 24)
