"""The position of one sequence's output in its grammar."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from llguidance import LLMatcher


@runtime_checkable
class Planner(Protocol):
    """Finds tokens that complete an output. Both methods return None where no such list of at most `max_tokens` is
    known, and () where the output may end."""

    def plan(self, matcher: LLMatcher, max_tokens: int) -> tuple[int, ...] | None:
        """Return tokens that complete the output of a matcher."""

    def update(
        self, matcher: LLMatcher, token_id: int, previous_plan: tuple[int, ...], max_tokens: int
    ) -> tuple[int, ...] | None:
        """Return tokens that complete the output of a matcher that has just consumed `token_id`.

        previous_plan: the tokens that completed it before.
        """


class GrammarState:
    """Follows the output of one sequence: which tokens may come next, which must, and which complete it.

    An output with reasoning has three phases: the start marker, whose tokens are forced; free text; and, once the
    tokens of the end marker were generated, the grammar. Other tokens that spell the end marker are free text.

    matcher: of the grammar, before its first token. It belongs to this object.
    eos_token_id: ends an output where its grammar lets it end.
    reasoning_start, reasoning_end: tokens of the markers; there is no reasoning if the latter are empty.
    max_tokens: of the output, markers and reasoning included.
    planner: keeps a completion that fits into the tokens that are left; without one, the last token may leave the
        output open.
    plan: tokens that complete the grammar from its first state.
    is_closing: only the tokens of the completion may follow, and no draft tokens.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        eos_token_id: int,
        *,
        reasoning_start: Sequence[int] = (),
        reasoning_end: Sequence[int] = (),
        max_tokens: int,
        planner: Planner | None = None,
        plan: tuple[int, ...] = (),
    ) -> None:
        self.is_closing = False
        self._matcher = matcher
        self._eos_token_id = eos_token_id
        self._start, self._end = list(reasoning_start if reasoning_end else ()), list(reasoning_end)
        self._is_reasoning = bool(reasoning_end)
        self._reasoning: list[int] = []  # tokens before the grammar's first
        self._num_consumed = 0  # tokens of the grammar
        self._num_left = max_tokens
        self._planner = planner
        self._plan = plan
        # Plans by the plan before a token and the token: the next object of an array is completed as the one before,
        # and a search takes up to 2 ms. Kept for each sequence, so that no output depends on other requests.
        self._found: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether the output is whole and no token can follow."""
        return not self._is_reasoning and self._matcher.is_stopped()

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token is not the grammar's: it belongs to the start marker or to free text."""
        return self._is_reasoning

    @property
    def completion(self) -> tuple[int, ...]:
        """Tokens that complete the output; the first ones may be what is left of the end marker."""
        if self.is_closing or not self._is_reasoning:
            return self._plan
        marker = self._start + self._end
        matched = len(self._reasoning)
        if matched >= len(self._start):
            free = self._reasoning[len(self._start) :]
            matched = len(self._start) + next(
                size for size in range(len(self._end) - 1, -1, -1) if free[len(free) - size :] == self._end[:size]
            )
        return (*marker[matched:], *self._plan)

    def accept(self, token_id: int) -> bool:
        """Move over a token of the output. Return False, and stay, if no completion in the tokens left is known.

        Raises RuntimeError for a token that the grammar does not allow.
        """
        if not self.try_consume(token_id):
            reason = self._matcher.get_error() or "it is not allowed here"
            raise RuntimeError(f"the grammar rejects token {token_id}: {reason:.300}")
        self._num_left -= 1
        if self.is_closing:
            self._plan = self._plan[1:]
            return True
        if self._planner is None:
            return True
        previous, plan = self._plan, self._plan_after(token_id, self._planner)
        if plan is not None:
            self._plan = plan
            if len(self.completion) <= self._num_left:
                return True
            self._plan = previous
        self._num_left += 1
        self.undo(1)
        return False

    def close(self) -> None:
        """Let only the completion follow. An output that may end already gets an end token."""
        self._plan, self.is_closing = self.completion or (self._eos_token_id,), True

    def forced_token(self) -> int | None:
        """Return the only token that may come next: one of the start marker or of the completion, or the canonical
        spelling's where the grammar allows one text. None if there is a choice."""
        token_id = self._given_token()
        if token_id is None and not self._is_reasoning:
            token_id = next(iter(self._matcher.compute_ff_tokens()), None)
        return token_id

    def write_mask(self, words: np.ndarray) -> bool:
        """Write the mask of the next token, in the layout of `ops.mask_tokens`. Return False for free text.

        Where `forced_token` returns a token, the mask allows no other one.
        """
        token_id = self._given_token()
        if token_id is not None:
            words[:] = 0
            words[token_id >> 5] = np.uint32(1 << (token_id & 31)).astype(np.int32)
        elif not self._is_reasoning:
            # `words.ctypes.data` takes 1 us more.
            self._matcher.unsafe_compute_mask_ptr(words.__array_interface__["data"][0], words.nbytes)
        return token_id is not None or not self._is_reasoning

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
            if self._matcher.is_stopped() or not self._matcher.try_consume_tokens([token_id]):
                return False
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
        of_grammar = min(num_tokens, self._num_consumed)
        if of_grammar:
            self._matcher.rollback(of_grammar)
            self._num_consumed -= of_grammar
        if num_tokens > of_grammar:
            del self._reasoning[len(self._reasoning) - (num_tokens - of_grammar) :]
            self._is_reasoning = True

    def _given_token(self) -> int | None:
        """Return the next token of the completion that must follow, or of the start marker; None past them."""
        if self.is_closing:
            return self._plan[0] if self._plan else None
        if self._is_reasoning and len(self._reasoning) < len(self._start):
            return self._start[len(self._reasoning)]
        return None

    def _plan_after(self, token_id: int, planner: Planner) -> tuple[int, ...] | None:
        """Return the plan after a token that was just consumed."""
        if not self._num_consumed:
            return self._plan
        if self._matcher.is_stopped():
            return ()
        key = self._plan, token_id
        plan = self._found.get(key)
        if plan is None or not self._is_completed_by(plan):
            plan = planner.update(self._matcher, token_id, self._plan, self._num_left)
            if plan is not None and plan not in (self._plan, self._plan[1:]):
                self._found[key] = plan
        return plan

    def _is_completed_by(self, plan: tuple[int, ...]) -> bool:
        return self._matcher.validate_tokens([*plan, self._eos_token_id]) > len(plan)
