import json
import random
import re

import jsonschema_rs
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.grammar_walks import (
    INTEGER,
    PLANNER,
    SHORTEST,
    STRING,
    TOKENIZER,
    allowed_tokens,
    check_schema,
    check_walks,
    closed_object,
    matcher_of,
    random_token,
    walk,
)


@pytest.mark.smoke
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
        st.sampled_from(["date", "time", "uuid", "ipv4", "email"]).map(lambda name: {**STRING, "format": name}),
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


@settings(deadline=None, derandomize=True, max_examples=30, phases=(Phase.explicit, Phase.generate))
@given(schemas(), st.integers(0, 2**32))
def test_cut_documents_of_any_schema_are_valid(schema, seed):
    check_schema(schema, random.Random(seed), 24)


@pytest.mark.parametrize(
    "regex",
    [
        r"[a-z]+@[a-z]+\.com",
        "(foo|barbarbar){5}",
        "[0-9]{3}-[0-9]{4}(é|ü)",
        "[^S]{3,}S[A-C]",
        r"\s{20,}x",
        "(😀|é){2,}!",
        "(ab)*",
    ],
)
def test_cut_texts_match_the_regex(regex):
    check_walks(
        matcher_of("regex", regex),
        lambda text: re.fullmatch(regex, text),
        random.Random(regex),
        max_tokens=40,
    )


def test_cut_choices_are_choices():
    choices = ["yes", "no", "maybe", "not at all", "é"]
    check_walks(matcher_of("choice", choices), choices.__contains__, random.Random(0), max_tokens=12)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: sum\nsum: NUM | "(" sum ")" | sum "+" sum | "[" sum ("," sum)* "]"\nNUM: /[1-9][0-9]*/',
        'start: "not " start | "(" start ")" | "a" " and " start | "b"',
    ],
)
def test_cut_expressions_are_expressions(grammar):
    def check(text: str) -> bool:
        return compile(text, "output", "eval") is not None

    rng = random.Random(grammar)
    for _ in range(5):
        check_walks(matcher_of("grammar", grammar), check, rng, max_tokens=30)


def test_cut_tags_hold_documents():
    grammar = 'start: (text | tag)*\ntext: /[^<]+/\ntag: "<call>" call "</call>"\ncall: %json ' + json.dumps(
        closed_object(name=STRING, amount=INTEGER)
    )
    validator = jsonschema_rs.validator_for(closed_object(name=STRING, amount=INTEGER))

    def check(text: str) -> bool:
        bodies = re.findall("<call>(.*?)</call>", text, re.DOTALL)
        return text.count("<call>") == len(bodies) and all(validator.is_valid(json.loads(body)) for body in bodies)

    def choose(matcher, rng):
        opening = [token for token in allowed_tokens(matcher) if TOKENIZER.decode_bytes([token])[:1] == b"<"]
        return rng.choice(opening) if opening and rng.random() < 0.5 else random_token(matcher, rng)

    for seed in range(5):
        check_walks(matcher_of("grammar", grammar), check, random.Random(seed), max_tokens=40, choose=choose)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_documents_are_closed(opening):
    def choose(matcher, rng):
        for text in (opening, *(bytes([byte]) for byte in opening)):
            token = TOKENIZER.tokenize_bytes(text)[0]
            if matcher.validate_tokens([token]):
                return token
        return random_token(matcher, rng)

    matcher = matcher_of("json_schema", {"type": ["array", "object"]})
    plan = PLANNER.plan(matcher, 10)
    for budget in (*range(len(plan), 40), 200):
        json.loads(walk(matcher, plan, random.Random(0), budget, choose=choose))
