import json

import jsonschema_rs
import pytest

from dispec.engine.structured_output.closing_candidates import ClosingCandidates
from dispec.engine.structured_output.closing_search import ClosingSearch, Effort
from tests.grammar_walks import INTEGER, PLANNER, SHORTEST, STRING, TOKENIZER, closed_object, matcher_of


@pytest.mark.parametrize("name", SHORTEST)
def test_first_plans_are_short(name):
    schema, shortest = SHORTEST[name]
    matcher = matcher_of("json_schema", schema)
    room = int(1.5 * len(TOKENIZER.tokenize_str(shortest)))
    plan = PLANNER.plan(matcher, room)
    assert plan is not None, TOKENIZER.decode_str(list(PLANNER.plan(matcher, 1000) or ()))
    assert len(plan) <= room
    assert jsonschema_rs.is_valid(schema, json.loads(TOKENIZER.decode_str(list(plan))))


def test_characters_are_completed():
    matcher = matcher_of("json_schema", closed_object(name=STRING))
    text = '{"name":"😀é東'.encode()
    plan = PLANNER.plan(matcher, 100)
    for i, byte in enumerate(text):
        token = TOKENIZER.tokenize_bytes(bytes([byte]))[0]
        assert matcher.consume_token(token)
        plan = PLANNER.update(matcher, token, plan, 100)
        closed = text[: i + 1] + TOKENIZER.decode_bytes(list(plan))
        assert list(json.loads(closed.decode())) == ["name"]


def test_plans_hold_the_special_tokens_that_a_grammar_asks():
    matcher = matcher_of("grammar", 'start: "a" <|im_start|> /b+/')
    plan = PLANNER.plan(matcher, 10)
    assert TOKENIZER.decode_str(list(plan)) == "a<|im_start|>b"


def test_free_text_needs_no_plan():
    matcher = matcher_of("grammar", "start: /(.|\\n)*/")
    assert PLANNER.plan(matcher, 0) == ()
    token = TOKENIZER.tokenize_str("a")[0]
    assert matcher.consume_token(token)
    assert PLANNER.update(matcher, token, (), 0) == ()


def test_a_plan_that_is_followed_stays():
    matcher = matcher_of("json_schema", closed_object(name=STRING, age=INTEGER))
    plan = PLANNER.plan(matcher, 100)
    while plan:
        assert matcher.consume_token(plan[0])
        assert PLANNER.update(matcher, plan[0], plan, len(plan) - 1) == plan[1:]
        plan = plan[1:]
    assert matcher.is_accepting()


def test_too_few_tokens_have_no_plan():
    matcher = matcher_of("json_schema", closed_object(name=STRING, age=INTEGER))
    shortest = len(PLANNER.plan(matcher, 100))
    assert PLANNER.plan(matcher, shortest - 1) is None
    token = TOKENIZER.tokenize_str("{")[0]
    matcher.consume_token(token)
    assert PLANNER.update(matcher, token, PLANNER.plan(matcher, 100), 2) is None


def test_planning_leaves_the_matcher_alone():
    matcher = matcher_of("json_schema", closed_object(name=STRING, items={"type": "array", "minItems": 2}))
    plan = PLANNER.plan(matcher, 100)
    for token in TOKENIZER.tokenize_str('{"name":"x","items":[{"a":1},[')[:-1]:
        assert matcher.consume_token(token)
        mask = matcher.compute_bitmask()
        plan = PLANNER.update(matcher, token, plan, 100)
        PLANNER.plan(matcher, 100)
        assert matcher.compute_bitmask() == mask
        assert not matcher.is_error()


def test_searches_end_at_their_limit():
    # The masks within the text are all the same: none shows that "</" leads on.
    matcher = matcher_of("grammar", 'start: /(.|\\n)*/ "</answer>" /[a-z]{40}/')
    effort = Effort(50, 10.0)
    assert ClosingSearch(ClosingCandidates(TOKENIZER, TOKENIZER.vocab_size)).find(matcher, None, effort) is None
    assert effort.num_states == 0
    effort = Effort(10**6, 0.001)
    assert ClosingSearch(ClosingCandidates(TOKENIZER, TOKENIZER.vocab_size)).find(matcher, None, effort) is None
    assert effort.seconds <= 0
