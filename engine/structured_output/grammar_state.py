"""The position of one sequence's output in its grammar."""

import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from llguidance import LLMatcher

# With more tokens left than this and the plan, a token is kept although no completion is found after it: a search has
# limits, and one a few tokens later mostly finds one.
_FEW_TOKENS = 64
_ANY_LENGTH = 2**31 - 1
# llguidance tokenizes a forced span as a whole at each of its tokens: 1 ms for 2,000, and 5 s for all of 4,000. Behind
# the first tokens, the list is kept. It may differ from a new one, and those of a step must be those of its masks.
_FRESH_TOKENS = 64
# Ambiguous grammars take 0.1 to 2 s for each token, during which no other sequence advances; usual ones take 50 us, and
# up to 20 ms at first. Where no completion is known, searches take 10 ms at some tokens.
_FREE_SECONDS, _SECONDS_PER_TOKEN = 2.0, 0.05
_RETRY_TOKENS = 8  # between two searches of up to 5 ms while no completion is known


@runtime_checkable
class Planner(Protocol):
    """Finds tokens that complete an output."""

    def update(
        self, matcher: LLMatcher, token_id: int, previous_plan: tuple[int, ...], max_tokens: int
    ) -> tuple[int, ...] | None:
        """Return tokens that complete the output of a matcher that has just consumed `token_id`: at most `max_tokens`,
        none where the output may end, and None where no such list is known.

        previous_plan: the tokens that completed it before.
        """


class GrammarState:
    """Follows the output of one sequence: which tokens may come next, which must, and which complete it.

    An output with reasoning has three phases: the start marker, whose tokens are forced; free text; and, once the
    tokens of the end marker were generated, the grammar. Other tokens that spell the end marker are free text.

    matcher: of the grammar, before its first token. It belongs to this object. None for free text after the end marker.
    eos_token_id: ends an output where its grammar lets it end.
    reasoning_start, reasoning_end: tokens of the markers; there is no reasoning if the latter are empty.
    reasoning_max_tokens: most tokens of free text; the end marker is forced then. None is no limit.
    max_tokens: of the output, markers and reasoning included.
    planner: keeps a completion that fits into the tokens that are left. Without one, or if it finds none, the last
        token may leave the output open.
    plan: tokens that complete the grammar from its first state; None if none are known.
    is_closing: only the tokens of the completion may follow, and no draft tokens.
    """

    def __init__(
        self,
        matcher: LLMatcher | None,
        eos_token_id: int,
        *,
        reasoning_start: Sequence[int] = (),
        reasoning_end: Sequence[int] = (),
        reasoning_max_tokens: int | None = None,
        max_tokens: int,
        planner: Planner | None = None,
        plan: tuple[int, ...] | None = (),
    ) -> None:
        self.is_closing = False
        self._matcher = matcher
        self._eos_token_id = eos_token_id
        self._start, self._end = list(reasoning_start if reasoning_end else ()), list(reasoning_end)
        self._is_reasoning = bool(reasoning_end)
        self._reasoning_max_tokens = reasoning_max_tokens
        self._reasoning: list[int] = []  # tokens before the grammar's first
        self._forced: list[int] = []  # tokens of a forced span that follow, the last one first
        self._num_forced = 0  # tokens of that span so far
        self._num_consumed = 0  # tokens of the grammar
        self._seconds = 0.0  # of this thread, spent on the grammar
        self._num_left = max_tokens
        self._planner = planner
        self._plan = plan
        # Plans by the plan before a token and the token: the next object of an array is completed as the one before,
        # and a search takes up to 2 ms. Kept for each sequence, so that no output depends on other requests.
        self._found: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether the output is whole and no token can follow."""
        matcher = self._matcher
        return not self._is_reasoning and matcher is not None and matcher.is_stopped() and not matcher.is_error()

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token is not the grammar's: it belongs to the start marker or to free text."""
        return self._is_reasoning

    @property
    def completion(self) -> tuple[int, ...] | None:
        """Tokens that complete the output, with what is left of the end marker; None if none are known."""
        if self.is_closing or not self._is_reasoning or self._plan is None:
            return self._plan
        return (*self._start[len(self._reasoning) :], *self._rest_of_end(), *self._plan)

    def accept(self, token_id: int) -> bool:
        """Move over a token of the output. Return False, and stay, if the output can be completed now but not after it:
        for want of tokens, or because the grammar exceeds a limit of llguidance or of time.

        Raises RuntimeError for a token that the grammar does not allow, and beyond a limit without a known completion.
        """
        started = time.thread_time()
        is_accepted = self._accept(token_id)
        self._seconds += time.thread_time() - started
        return is_accepted

    def _accept(self, token_id: int) -> bool:
        if self.is_closing:
            self.try_consume(token_id)  # beyond a limit the matcher stays where it is
            self._num_left -= 1
            self._plan = self._plan[1:] if self._plan else None
            return True
        limit = self._exceeded_limit()
        if limit is None and not self.try_consume(token_id):
            limit = self._exceeded_limit()
            if limit is None:
                raise RuntimeError(f"the grammar rejects token {token_id}: it is not allowed here")
        if limit is not None:
            if self.completion is None:
                raise RuntimeError(f"the grammar rejects token {token_id}: {limit:.300}")
            return False
        self._num_left -= 1
        if self._planner is not None:
            previous = self._plan
            if self._num_consumed and self._matcher is not None:
                is_stopped = self._matcher.is_stopped()
                self._plan = () if is_stopped else self._plan_after(token_id, self._matcher, self._planner)
            if previous is not None and not self._leaves_room(previous):
                self._plan = previous
                self._num_left += 1
                self.undo(1)
                return False
        return True

    def _exceeded_limit(self) -> str | None:
        """Return the limit that the grammar exceeds, if any."""
        if self._matcher is not None and self._matcher.is_error():
            return self._matcher.get_error() or "the grammar engine failed"
        if self._seconds > _FREE_SECONDS + _SECONDS_PER_TOKEN * self._num_consumed:
            return f"it takes more than {_SECONDS_PER_TOKEN:g} s for each token"
        return None

    def close(self) -> None:
        """Let only the completion follow. An output that may end already gets an end token."""
        self._plan, self.is_closing = self.completion or (self._eos_token_id,), True

    def forced_token(self) -> int | None:
        """Return the only token that may come next: one of the start marker or of the completion, or the canonical
        spelling's where the grammar allows one text. None if there is a choice."""
        token_id = self._given_token()
        if token_id is None and not self._is_reasoning and self._matcher is not None:
            self._forced = self._forced or self._matcher.compute_ff_tokens()[::-1]
            token_id = self._forced[-1] if self._forced else None
        return token_id

    def write_mask(self, words: np.ndarray) -> bool:
        """Write the mask of the next token, in the layout of `ops.mask_tokens`. Return False for free text.

        Where `forced_token` returns a token, the mask allows no other one.
        """
        token_id = self._given_token()
        if token_id is not None:
            words[:] = 0
            words[token_id >> 5] = np.uint32(1 << (token_id & 31)).astype(np.int32)
        elif self._is_reasoning or self._matcher is None:
            return False
        else:
            started = time.thread_time()
            # `words.ctypes.data` takes 1 us more.
            self._matcher.unsafe_compute_mask_ptr(words.__array_interface__["data"][0], words.nbytes)
            self._seconds += time.thread_time() - started
        return True

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """Return how many of the tokens that follow are allowed."""
        count = 0
        for token_id in token_ids:
            if self.forced_token() not in (None, token_id) or not self.try_consume(token_id):
                break
            count += 1
        self.undo(count)
        return count

    def try_consume(self, token_id: int) -> bool:
        """Move over a token if it is allowed; `undo` moves back."""
        if not self._is_reasoning:
            matcher = self._matcher
            if matcher is not None and (matcher.is_stopped() or not matcher.try_consume_tokens([token_id])):
                return False
            is_forced = bool(self._forced) and self._forced.pop() == token_id
            self._num_forced = self._num_forced + 1 if is_forced else 0
            if self._num_forced < _FRESH_TOKENS:
                self._forced.clear()
            self._num_consumed += 1
            return True
        index = len(self._reasoning)
        if index < len(self._start) and token_id != self._start[index]:
            return False
        self._reasoning.append(token_id)
        size = len(self._end)
        self._is_reasoning = index + 1 < len(self._start) + size or self._reasoning[-size:] != self._end
        return True

    def undo(self, num_tokens: int) -> None:
        """Move back over the last tokens."""
        if num_tokens:
            self._forced.clear()
            self._num_forced = 0
        of_grammar = min(num_tokens, self._num_consumed)
        self._num_consumed -= of_grammar
        if of_grammar and self._matcher is not None:
            self._matcher.rollback(of_grammar)
        if num_tokens > of_grammar:
            del self._reasoning[len(self._reasoning) - (num_tokens - of_grammar) :]
            self._is_reasoning = True

    def _given_token(self) -> int | None:
        """Return the next token of the completion that must follow, or of a marker that must; None without one."""
        if self.is_closing:
            return self._plan[0] if self._plan else None
        if self._is_reasoning:
            num_free = len(self._reasoning) - len(self._start)
            if num_free < 0:
                return self._start[num_free]
            if self._reasoning_max_tokens is not None and num_free >= self._reasoning_max_tokens:
                return self._rest_of_end()[0]
        return None

    def _rest_of_end(self) -> list[int]:
        """Return the tokens of the end marker that the free text does not end with."""
        free = self._reasoning[len(self._start) :][-len(self._end) :]
        sizes = range(min(len(free), len(self._end) - 1), 0, -1)
        matched = next((size for size in sizes if free[-size:] == self._end[:size]), 0)
        return self._end[matched:]

    def _leaves_room(self, previous_plan: tuple[int, ...]) -> bool:
        """Return whether the tokens left after the last one suffice, as far as that is known."""
        completion = self.completion
        if completion is None:
            return self._num_left > len(previous_plan) + _FEW_TOKENS
        return len(completion) <= self._num_left

    def _plan_after(self, token_id: int, matcher: LLMatcher, planner: Planner) -> tuple[int, ...] | None:
        """Return the plan after a token of the grammar that was just consumed; None if none is found."""
        previous, num_left = self._plan, self._num_left
        if previous is None:
            is_due = num_left % _RETRY_TOKENS == 0 or num_left <= _FEW_TOKENS
            return planner.update(matcher, token_id, (), num_left) if is_due else None
        plan = self._found.get((previous, token_id))
        if plan is not None and matcher.validate_tokens([*plan, self._eos_token_id]) > len(plan):
            return plan
        plan = planner.update(matcher, token_id, previous, num_left)
        if plan is None:
            plan = planner.update(matcher, token_id, previous, _ANY_LENGTH)  # one that is too long, or none at all
        elif plan not in (previous, previous[1:]):
            self._found[previous, token_id] = plan
        return plan
