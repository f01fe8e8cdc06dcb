"""Searches for tokens that lead from a state of a grammar to an accepting one.

The states of a matcher cannot be compared. Two states count as one if they have the same mask and their paths have the
same outline: open brackets, separators and a name behind each of them, and bytes since the last bracket, separator or
quote.
Two orders take turns: cheap paths first, which finds short ends, and deep paths that leave few brackets open, which
finds long ends of many required parts.
"""

import time
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count

from llguidance import LLMatcher
from xxhash import xxh3_64_intdigest

from dispec.engine.structured_output.closing_candidates import Candidate, ClosingCandidates, KnownPlan

_OPENING, _CLOSING, _SEPARATORS, _QUOTE, _COLON = b"[{(", b"]})", b",:;", ord('"'), ord(":")
_SPECIAL = b"\xff"  # what llguidance puts before the text of a special token
_DEPTH_COST = 2.0  # of an open bracket, in the order that prefers deep paths
_EDGE_GAIN = 1.1  # of a token, in the same order
_REPEAT_COST = 0.5  # of a byte other than a digit that the segment has already, in the same order
# Of tokens that lead to a state with the same mask: they may go round in a circle, or count up to a length.
_STAY_COST, _NEXT_STAY_COST = 2.0, 0.3
_LATER_SHARE = 8  # one of so many states is one to try later
_MAX_TAIL_BYTES = 64
_NUM_TAILS = 8  # tried with the same first byte in a state


class Effort:
    """Limits a search: states, and seconds of CPU time in masks.

    The first limit is the same on every machine. The second one is for grammars whose masks take milliseconds; it
    leaves out Python's work, in which a garbage collection may take 0.2 s.
    """

    def __init__(self, num_states: int, seconds: float) -> None:
        self.num_states = num_states
        self.seconds = seconds

    @property
    def is_spent(self) -> bool:
        return self.num_states <= 0 or self.seconds <= 0

    def mask(self, matcher: LLMatcher) -> bytes:
        """Return the mask of a state, and count it."""
        start = time.thread_time()
        mask: bytes = matcher.compute_bitmask()
        self.seconds -= time.thread_time() - start
        return mask


class _State:
    """A state that the search reached: the tokens from `parent`, the matcher behind them, the outline of the path.

    depth: brackets that the path opened less those that it closed.
    brackets: for each open one, the separators behind it, and the first quoted text behind the last comma: a name.
    segment: the text since the last bracket, separator or quote.
    """

    def __init__(self, parent: "_State | None", tokens: list[int], text: bytes, matcher: LLMatcher) -> None:
        self.parent = parent
        self.tokens = tokens
        self.matcher = matcher
        self.fingerprint = 0
        self.is_stay = False
        self.has_stay = False
        self.num_bytes: int = len(text) + (parent.num_bytes if parent else 0)
        self.depth: int = parent.depth if parent else 0
        self.brackets: tuple[tuple[int, bytes], ...] = parent.brackets if parent else ((0, b""),)
        self.segment: bytes = parent.segment if parent else b""
        self.is_quoted: bool = parent.is_quoted if parent else False
        self.is_text: bool = parent is not None and parent.is_text
        for byte in text:
            self._outline(byte)

    @property
    def key(self) -> tuple[object, ...]:
        return self.fingerprint, self.depth, self.brackets, self.is_quoted, len(self.segment)

    def path(self) -> list[int]:
        """Return the tokens from the root."""
        parts = []
        state: _State | None = self
        while state is not None:
            parts.append(state.tokens)
            state = state.parent
        return [token for part in reversed(parts) for token in part]

    def detour(self, text: bytes) -> float:
        """Return what a token with this text costs in the order that prefers deep paths, more than its own cost."""
        first = text[:1]
        is_plain = not (self.is_quoted or self.is_text)
        if is_plain and first in _OPENING:
            return _DEPTH_COST - _EDGE_GAIN
        if is_plain and first in _CLOSING:
            return -_DEPTH_COST - _EDGE_GAIN
        num_repeats = 0 if first.isdigit() else self.segment.count(first)
        return num_repeats * _REPEAT_COST - _EDGE_GAIN

    def _outline(self, byte: int) -> None:
        num_separators, name = self.brackets[-1]
        is_plain = not (self.is_quoted or self.is_text)
        if byte == _QUOTE and (self.is_quoted or is_plain) and not self.segment.endswith(b"\\"):
            if self.is_quoted and not name:
                self.brackets = (*self.brackets[:-1], (num_separators, self.segment))
            self.is_quoted = not self.is_quoted
        elif is_plain and byte in _OPENING:
            self.depth += 1
            self.brackets += ((0, b""),)
        elif is_plain and byte in _CLOSING:
            self.depth -= 1
            self.brackets = self.brackets[:-1] or ((0, b""),)
        elif is_plain and byte in _SEPARATORS:
            self.brackets = (*self.brackets[:-1], (num_separators + 1, name if byte == _COLON else b""))
        else:
            self.segment += bytes([byte])
            return
        self.segment = b""


class _Edge:
    """Tokens to follow from a state. cost, order: of the path with them, in either order."""

    def __init__(
        self, parent: _State | None, tokens: Sequence[int], cost: float, order: float, is_stay: bool = False
    ) -> None:
        self.parent = parent
        self.tokens = tokens
        self.cost = cost
        self.order = order
        self.is_stay = is_stay
        self.is_done = False


class _Frontier:
    """The edges to follow, in the orders that take turns. prefers_cheap: leave out the order of deep paths."""

    def __init__(self, prefers_cheap: bool) -> None:
        self._prefers_cheap = prefers_cheap
        self._cheap: list[tuple[float, int, _Edge]] = []
        self._deep: list[tuple[float, int, _Edge]] = []
        self._later: list[tuple[float, int, _State, Sequence[Candidate], _Edge]] = []
        self._serial = count()
        self._num_popped = 0

    def push(self, edge: _Edge) -> None:
        serial = next(self._serial)
        heappush(self._cheap, (edge.cost, serial, edge))
        if not self._prefers_cheap:
            heappush(self._deep, (edge.order, serial, edge))

    def push_later(self, state: _State, candidates: Sequence[Candidate], edge: _Edge) -> None:
        """Put edges behind `edge` aside, as one entry: most are never followed. candidates: cheap ones first."""
        if candidates:
            heappush(self._later, (edge.cost + candidates[0][0], next(self._serial), state, candidates, edge))

    def pop(self) -> _Edge | None:
        """Return the next edge, None when all were followed."""
        while self._cheap or self._later:
            self._num_popped += 1
            if not self._cheap or (self._later and self._num_popped % _LATER_SHARE == 0):
                cost, _, state, candidates, before = heappop(self._later)
                self.push_later(state, candidates[1:], before)
                return _Edge(state, candidates[0][1], cost, before.order + candidates[0][0])
            edge = heappop(self._deep if self._deep and self._num_popped % 2 else self._cheap)[2]
            if not edge.is_done:
                edge.is_done = True
                return edge
        return None


class ClosingSearch:
    """Searches with the candidates of one vocabulary."""

    def __init__(self, candidates: ClosingCandidates) -> None:
        self._candidates = candidates

    def completes(self, matcher: LLMatcher, tokens: Sequence[int]) -> bool:
        """Return whether the tokens lead to an accepting state."""
        return matcher.validate_tokens([*tokens, self._candidates.eos]) > len(tokens)

    def find(
        self, matcher: LLMatcher, known: KnownPlan | None, effort: Effort, min_saved: int | None = None
    ) -> list[int] | None:
        """Return tokens that complete the output.

        known: a plan of which a tail may complete a state. It ends the search.
        min_saved: bytes by which the text is shorter than the known plan's.
        """
        candidates = self._candidates
        frontier = _Frontier(prefers_cheap=min_saved is not None)
        frontier.push(_Edge(None, (), 0.0, 0.0))
        seen: set[object] = set()
        while not effort.is_spent and (edge := frontier.pop()) is not None:
            effort.num_states -= 1
            state = self._follow(matcher, edge)
            if state is None or (min_saved is not None and known and state.num_bytes > len(known) - min_saved):
                continue
            if state.matcher.is_accepting():
                return state.path()
            mask = effort.mask(state.matcher)
            state.fingerprint = xxh3_64_intdigest(mask)
            state.is_text = candidates.is_text(mask)
            state.is_stay = edge.is_stay
            parent = edge.parent
            if parent is None:
                state.is_quoted = state.is_text and not candidates.allows(mask, ord("\n"))  # JSON escapes line breaks
            elif state.fingerprint == parent.fingerprint and not edge.is_stay:
                if parent.has_stay:
                    continue
                parent.has_stay = True
                stay_cost = _NEXT_STAY_COST if parent.is_stay else _STAY_COST
                cost, order = edge.cost + stay_cost, edge.order + stay_cost
                if (run := candidates.longest_run(edge.tokens, mask)) is not None:
                    frontier.push(_Edge(parent, (run,), cost, order, is_stay=True))
                frontier.push(_Edge(parent, edge.tokens, cost, order, is_stay=True))
                continue
            if state.key in seen:
                continue
            seen.add(state.key)
            if (tail := self._tail(state, mask, known, min_saved)) is not None:
                return state.path() + tail
            first, later = candidates.edges(mask, state.is_quoted)
            for more, tokens in first:
                detour = more + state.detour(candidates.text(tokens))
                frontier.push(_Edge(state, tokens, edge.cost + more, edge.order + detour))
            frontier.push_later(state, later, edge)
        return None

    def _follow(self, root: LLMatcher, edge: _Edge) -> _State | None:
        matcher = (edge.parent.matcher if edge.parent else root).deep_copy()
        tokens = list(edge.tokens)
        if tokens and not matcher.consume_tokens(tokens):
            return None
        if not matcher.is_accepting():
            forced = matcher.compute_ff_bytes().partition(_SPECIAL)[0]
            forced_tokens = self._candidates.tokenize(forced) if forced else []
            if forced_tokens and not matcher.consume_tokens(forced_tokens):
                return None
            tokens += forced_tokens
        return _State(edge.parent, tokens, self._candidates.text(tokens), matcher)

    def _tail(self, state: _State, mask: bytes, known: KnownPlan | None, min_saved: int | None) -> list[int] | None:
        if known is None:
            return None
        min_offset = 0 if min_saved is None else state.num_bytes + min_saved
        for byte, offsets in known.offsets():
            if not self._candidates.allows(mask, byte):
                continue
            for offset in [offset for offset in offsets if offset >= min_offset][:_NUM_TAILS]:
                if self.completes(state.matcher, tail := known.tail(offset)):
                    return tail
        return None
