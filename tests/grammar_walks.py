"""Outputs of random tokens under a grammar, which closing plans end in time."""

import json
import random
from collections.abc import Callable

import jsonschema_rs
import numpy as np
from llguidance import LLMatcher, LLTokenizer, grammar_from

from dispec.engine.structured_output.closing_plan import ClosingPlanner
from tests.checkpoints import tiny_tokenizer

TOKENIZER = LLTokenizer(tiny_tokenizer().to_str(), eos_token=2)
PLANNER = ClosingPlanner(TOKENIZER, TOKENIZER.vocab_size)


def matcher_of(kind: str, grammar) -> LLMatcher:
    grammar = json.dumps(grammar) if kind == "json_schema" else grammar
    matcher = LLMatcher(TOKENIZER, grammar_from(kind, grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def allowed_tokens(matcher: LLMatcher) -> list[int]:
    return np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").nonzero()[0].tolist()


def random_token(matcher: LLMatcher, rng: random.Random) -> int:
    """An allowed token. Half of the time it begins with punctuation if it may, so that the output gets structure."""
    tokens = allowed_tokens(matcher)
    if rng.random() < 0.5:
        structure = [token for token in tokens if TOKENIZER.decode_bytes([token])[:1] in b'"{}[]:,()<>']
        tokens = structure or tokens
    return rng.choice(tokens)


def walk(matcher: LLMatcher, plan: tuple[int, ...], rng: random.Random, max_tokens: int, choose=random_token) -> str:
    """Return an output of random tokens that the plan closes in time."""
    matcher = matcher.deep_copy()
    output: list[int] = []
    while len(output) < max_tokens and not matcher.is_stopped():
        token = choose(matcher, rng)
        if token in TOKENIZER.eos_tokens:
            break
        assert matcher.consume_token(token)
        updated = PLANNER.update(matcher, token, plan, max_tokens - len(output) - 1)
        if updated is None:
            matcher.rollback(1)
            assert matcher.consume_tokens(list(plan))
            output.extend(plan)
            break
        output.append(token)
        plan = updated
    assert matcher.is_accepting()
    assert len(output) <= max_tokens
    return TOKENIZER.decode_bytes(output).decode()


def check_walks(
    matcher: LLMatcher, check: Callable[[str], object], rng: random.Random, max_tokens: int, choose=random_token
) -> None:
    """Check an output for every number of tokens that suffices, up to `max_tokens`."""
    first = PLANNER.plan(matcher, 1000)
    assert first is not None
    for budget in range(len(first), max(len(first), max_tokens) + 1):
        text = walk(matcher, first, rng, budget, choose)
        assert check(text), text


def check_schema(schema: dict, rng: random.Random, max_tokens: int) -> None:
    validator = jsonschema_rs.validator_for(schema)

    def check(text: str) -> bool:
        # llguidance allows exponents beyond those of floats.
        return validator.is_valid(json.loads(text, parse_float=lambda number: min(max(float(number), -1e300), 1e300)))

    check_walks(matcher_of("json_schema", schema), check, rng, max_tokens)


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
    "uuid": ({"type": "string", "format": "uuid"}, '"123e4567-e89b-12d3-a456-426614174000"'),
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
