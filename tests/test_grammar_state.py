"""The position of an output in its grammar: which tokens are kept, and what completes it."""

import pytest
from llguidance import LLMatcher, LLTokenizer, grammar_from

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.logits_processors import LogitsProcessors
from dispec.engine.scheduling.scheduler_output import append_sampled
from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.scheduling.token_output import TokenOutput
from dispec.engine.structured_output import grammar_state
from dispec.engine.structured_output.grammar_state import GrammarState
from dispec.serving.client.output_processor import OutputProcessor
from tests.checkpoints import EOS_TOKEN_ID, tiny_tokenizer

pytestmark = pytest.mark.smoke

TOKENIZER = LLTokenizer(tiny_tokenizer().to_str(), eos_token=EOS_TOKEN_ID)
Q, X, Z = (TOKENIZER.tokenize_str(letter)[0] for letter in "qxz")


class StubPlanner:
    """Returns the given plans in turn, None where they are longer than allowed."""

    def __init__(self, *plans: tuple[int, ...] | None) -> None:
        self.plans = list(plans)
        self.previous: list[tuple[int, ...]] = []

    def update(
        self, matcher: LLMatcher, token_id: int, previous_plan: tuple[int, ...], max_tokens: int
    ) -> tuple[int, ...] | None:
        self.previous.append(previous_plan)
        plan = self.plans[0]
        if plan is None or len(plan) <= max_tokens:
            self.plans = self.plans[1:] if len(self.plans) > 1 else self.plans
        return plan if plan is None or len(plan) <= max_tokens else None


def state_of(max_tokens: int, planner: StubPlanner | None = None, regex: str = "[qx]{300}z", **others) -> GrammarState:
    matcher = LLMatcher(TOKENIZER, grammar_from("regex", regex), log_level=0)
    return GrammarState(matcher, EOS_TOKEN_ID, max_tokens=max_tokens, planner=planner, plan=(X, Z), **others)


def test_a_token_is_dropped_where_its_completion_is_too_long():
    state = state_of(5, StubPlanner((X, X, Z), (X,) * 5))
    assert state.accept(Q)
    assert state.completion == (X, X, Z)
    assert not state.accept(Q)
    assert state.completion == (X, X, Z)
    state.close()
    assert state.forced_token() == X
    assert state.accept(X)
    assert (state.forced_token(), state.completion) == (X, (X, Z))


@pytest.mark.parametrize(("max_tokens", "is_kept"), [(500, True), (60, False)])
def test_a_token_without_a_known_completion_stays_while_many_tokens_are_left(max_tokens, is_kept):
    planner = StubPlanner(None, None, None, (X, Z))
    state = state_of(max_tokens, planner)
    assert state.accept(Q) == is_kept
    if is_kept:
        assert state.completion is None
        for _ in range(20):
            assert state.accept(X)
        assert state.completion == (X, Z), "a later search finds one"
        assert planner.previous[2] == ()


def test_without_an_open_place_an_end_token_completes():
    state = state_of(9, regex="[qx]*")
    state._plan = ()
    state.close()
    assert state.forced_token() == EOS_TOKEN_ID


def test_draft_tokens_leave_the_state_where_it_was():
    state = state_of(90, regex="q[qx]{4}z", reasoning_start=(5,), reasoning_end=(7, 8))
    assert state.completion == (5, 7, 8, X, Z)
    assert state.num_allowed([6]) == 0
    assert state.num_allowed([5, 9, 7, 8, Q, X, Z]) == 6  # q is forced, z comes too early
    assert state.is_reasoning
    assert state.forced_token() == 5
    for token, completion in ((5, (7, 8, X, Z)), (7, (8, X, Z)), (7, (8, X, Z)), (9, (7, 8, X, Z)), (7, (8, X, Z))):
        assert state.accept(token)
        assert state.completion == completion
    assert state.accept(8)
    assert not state.is_reasoning
    assert state.num_allowed([Q, X, X, X, X, Z, Q]) == 6
    assert state.num_allowed([X]) == 0
    assert state.forced_token() == Q


def test_a_token_that_is_not_allowed_is_an_error():
    with pytest.raises(RuntimeError, match=f"the grammar rejects token {Z}"):
        state_of(9).accept(Z)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_end_marker_is_forced_after_the_longest_reasoning(limit):
    state = state_of(90, regex="q[qx]{4}z", reasoning_start=(5,), reasoning_end=(7, 8), reasoning_max_tokens=limit)
    assert state.forced_token() == 5
    assert state.accept(5)
    for _ in range(limit):
        assert state.forced_token() is None
        assert state.accept(9)
    assert state.num_allowed([9]) == 0
    for token in (7, 8):
        assert state.forced_token() == token
        assert state.accept(token)
    assert not state.is_reasoning


def test_an_end_marker_under_way_is_completed_at_the_limit():
    state = state_of(90, reasoning_end=(7, 8), reasoning_max_tokens=2)
    assert state.accept(9)
    assert state.accept(7)
    assert state.forced_token() == 8


def sequence_of(choices: list[str], max_tokens: int, max_len: int) -> Sequence:
    """A sequence of an engine that computes at most `max_len` tokens of a request's `max_tokens`."""
    matcher = LLMatcher(TOKENIZER, grammar_from("choice", choices), log_level=0)  # type: ignore[arg-type]
    plan = tuple(TOKENIZER.tokenize_str(min(choices, key=len)))
    grammar = GrammarState(matcher, EOS_TOKEN_ID, max_tokens=max_tokens, planner=StubPlanner(None), plan=plan)
    params = SamplingParams(max_tokens=1, structured_outputs={"choice": choices})
    processors = LogitsProcessors(params, [1], 64, frozenset({EOS_TOKEN_ID}), grammar)
    return Sequence(0, [1], params, 0, frozenset({EOS_TOKEN_ID}), max_len, 0.0, logits_processors=processors)


def test_an_engine_that_another_one_continues_tells_whether_its_output_is_whole() -> None:
    whole = sequence_of(["q" * 99, "z"], max_tokens=20, max_len=2)
    (output,) = append_sampled(whole, Q)  # too long: closed by "z"
    assert (output.token_id, output.finish_reason, output.completes_grammar) == (Z, "length", True)
    begun = sequence_of(["q" * 99, "xz"], max_tokens=20, max_len=2)
    (output,) = append_sampled(begun, Q)
    assert (output.token_id, output.finish_reason, output.completes_grammar) == (X, "length", False)
    for made, expected in ((whole, "length"), (begun, None)):
        token = TokenOutput("", 0, made.token_ids[-1], "length", completes_grammar=made.is_whole)
        update = OutputProcessor(None, SamplingParams(), is_continued=True).process(token)
        assert update is not None
        assert update.finish_reason == expected


def test_a_grammar_that_takes_too_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(1000))
    monkeypatch.setattr(grammar_state.time, "thread_time", lambda: float(next(seconds)))
    state = state_of(20, StubPlanner((X, Z)), "[qx]*z")
    accepted = [state.accept(Q) for _ in range(4)]  # a second each
    assert accepted == [True, True, True, False]
    state.close()
    for token in (X, Z):
        assert state.forced_token() == token
        assert state.accept(token)
    unknown = state_of(20, StubPlanner(None), "[qx]*z")
    unknown._plan = None
    assert all(unknown.accept(Q) for _ in range(3))
    with pytest.raises(RuntimeError, match=r"rejects token \d+: it takes more than"):
        unknown.accept(Q)
