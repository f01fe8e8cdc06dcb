"""Completes outputs under a grammar: tokens that lead from a state to an accepting one."""

from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer

from dispec.engine.structured_output.closing_candidates import ClosingCandidates, KnownPlan
from dispec.engine.structured_output.closing_search import ClosingSearch, Effort

_FIRST_STATES, _FIRST_SECONDS = 3000, 0.2
_ALL_SHORTEN_STATES = 1000
_UPDATE_STATES, _UPDATE_SECONDS = 250, 0.01
_SHORTEN_STATES = (12, 60)  # of each search for a shorter end: quick ones everywhere before longer ones
_MAX_TAIL_BYTES = 64
_NUM_BRIDGED_TAILS = 4
# Texts that often lead to a state that the previous plan completes: of JSON documents, and the ends of characters.
_BRIDGES = (
    b"",
    *b"""" ] } ) "] "} 0 "" :0 :"" ":0 ":"" "":0 "":"" ":0} 0)""".split(),
    *(b"\x80", b"\x80\x80", b"\xa0\x80", b"\x90\x80\x80"),
)


class ClosingPlanner:
    """Finds tokens that complete an output. Safe to share between threads.

    tokenizer: the tables of the vocabulary with which the matchers were made.
    vocab_size: of the logits; a plan has no token beyond.
    """

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int) -> None:
        self._candidates = ClosingCandidates(tokenizer, vocab_size)
        self._search = ClosingSearch(self._candidates)
        self._bridges = [self._candidates.tokenize(text) for text in _BRIDGES]

    def can_write(self, text: str) -> bool:
        """Return whether the vocabulary has tokens for a text: some lack those of bytes that no training text had."""
        return not text or bool(self._candidates.tokenize(text.encode()))

    def plan(self, matcher: LLMatcher, max_tokens: int) -> tuple[int, ...] | None:
        """Return tokens that complete the output, at most `max_tokens`; () if it is complete. None if none were found
        within the limit of effort: 0.1 s on one core for grammars that no search ends, such as free text up to a marker
        that the text itself may have. The matcher's state stays.

        The first completion is found in 1 to 3 ms for most JSON Schemas. Only one that is too long is shortened, in 30
        to 200 ms.
        """
        if matcher.is_accepting():
            return ()
        effort = Effort(_FIRST_STATES, _FIRST_SECONDS)
        found = self._search.find(matcher, None, effort)
        if found is None:
            return None
        plan = self._compact(matcher, found)
        if len(plan) > max_tokens:
            effort.num_states = _ALL_SHORTEN_STATES
            for num_states in _SHORTEN_STATES:
                found = self._shorten(matcher, found, effort, num_states)
            plan = self._compact(matcher, found)
        return tuple(plan) if len(plan) <= max_tokens else None

    def update(
        self, matcher: LLMatcher, token_id: int, previous_plan: Sequence[int], max_tokens: int
    ) -> tuple[int, ...] | None:
        """Return the plan after `token_id`, which the matcher has consumed in the state of `previous_plan`. As `plan`,
        and cheaper.
        """
        if matcher.is_accepting():
            return ()
        plan = self._update(matcher, token_id, previous_plan)
        if plan is not None and len(plan) > max_tokens:
            plan = self._compact(matcher, plan)
            if len(plan) > max_tokens:
                effort = Effort(_UPDATE_STATES, _UPDATE_SECONDS)
                plan = self._compact(matcher, self._shorten(matcher, plan, effort, _SHORTEN_STATES[0]))
        return tuple(plan) if plan is not None and len(plan) <= max_tokens else None

    def _update(self, matcher: LLMatcher, token_id: int, previous_plan: Sequence[int]) -> Sequence[int] | None:
        if previous_plan and previous_plan[0] == token_id:
            return previous_plan[1:]
        if self._search.completes(matcher, previous_plan):
            return previous_plan
        known = KnownPlan(self._candidates, previous_plan, _MAX_TAIL_BYTES)
        for bridge in self._bridges:
            if bridge and matcher.validate_tokens(bridge) < len(bridge):
                continue
            for offset in range(min(_NUM_BRIDGED_TAILS, len(known))):
                if self._search.completes(matcher, plan := bridge + known.tail(offset)):
                    return plan
        return self._search.find(matcher, known, Effort(_UPDATE_STATES, _UPDATE_SECONDS))

    def _compact(self, matcher: LLMatcher, tokens: Sequence[int]) -> Sequence[int]:
        compact = self._candidates.compact(tokens)
        return compact if len(compact) < len(tokens) and self._search.completes(matcher, compact) else tokens

    def _shorten(self, matcher: LLMatcher, plan: Sequence[int], effort: Effort, num_states: int) -> list[int]:
        """Return the plan with parts replaced by shorter ones. num_states: of the search at each byte."""
        shorter = self._candidates.bytewise(plan)
        matcher = matcher.deep_copy()
        i = 0
        while i < len(shorter) and not effort.is_spent:
            if not matcher.compute_ff_bytes():
                known = KnownPlan(self._candidates, shorter[i:], _MAX_TAIL_BYTES)
                local = Effort(num_states, effort.seconds)
                found = self._search.find(matcher, known, local, min_saved=1)
                effort.num_states -= num_states - local.num_states
                effort.seconds = local.seconds
                if found is not None:
                    shorter[i:] = self._candidates.bytewise(found)
                    continue
            matcher.consume_token(shorter[i])
            i += 1
        return shorter
