"""How many tokens to guess for each sequence in the next step, so that the batch makes most tokens a second.

A guess is worth the chance that it and all before it are right, and costs what the step takes longer for another token.
Both are learned: the chance from each sequence's own guesses, the seconds from steps of so many tokens. Where no guess
pays there are none, but for one now and then that finds out whether that has changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

_PRIOR, _PRIOR_WEIGHT = 0.6, 2.0  # a sequence's chance before anything is known of it, and how many guesses that counts
_FORGETTING = 0.93  # of what was known of a chance, by each later step that guesses
_LEARNING = 0.15  # of a new time in the mean of a cost
_LEAST_GAIN = 1.01  # more tokens a second than without guesses, lest noise decide
_LEAST_HOPE = 1.15  # the same, of guesses that are all right, for one to be tried now and then
_PROBE_FIRST, _PROBE_LAST = 16, 256  # steps without a guess before one is tried


@dataclass(slots=True)
class Acceptance:
    """The chance that a sequence's first guess of a step is right, and that a later one is if those before it are.

    They differ: a first guess follows a token that was hard to guess, and so is likelier to be an easy one.
    """

    right: list[float] = field(default_factory=lambda: [_PRIOR * _PRIOR_WEIGHT] * 2)
    tried: list[float] = field(default_factory=lambda: [_PRIOR_WEIGHT] * 2)
    idle_steps: int = 0
    patience: int = _PROBE_FIRST

    def all_right(self, count: int) -> float:
        """The chance that the first `count` guesses of a step are all right."""
        first, later = (min(0.98, right / tried) for right, tried in zip(self.right, self.tried, strict=True))
        return first * later ** (count - 1)

    def observe(self, num_drafts: int, num_right: int) -> None:
        """Of `num_drafts` guesses the first `num_right` were right, the next one, if any, was wrong, others unknown."""
        known = num_right + (num_right < num_drafts)
        firsts = (min(num_right, 1), 1), (max(0, num_right - 1), known - 1)
        for place, (right, tried) in enumerate(firsts):
            weight = _FORGETTING**tried
            self.right[place] = self.right[place] * weight + right
            self.tried[place] = self.tried[place] * weight + tried
        if self.idle_steps:  # this was a probe
            self.patience = _PROBE_FIRST if num_right else min(_PROBE_LAST, 2 * self.patience)
            self.idle_steps = 0


class StepCosts:
    """Seconds of a step by the number of its tokens: a mean that follows slowly, and straight lines in between."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def observe(self, num_tokens: int, seconds: float) -> None:
        size = _rounded(num_tokens)
        old = self._seconds.get(size)
        # One step that something else held up says little.
        self._seconds[size] = seconds if old is None else old + _LEARNING * (min(seconds, 2 * old) - old)

    def of(self, num_tokens: int) -> float | None:
        """None while no step was seen. Beyond the largest that was seen a token is thought to be free: it is tried."""
        if not self._seconds:
            return None
        size = _rounded(num_tokens)
        if size in self._seconds:
            return self._seconds[size]
        below = max((known for known in self._seconds if known < size), default=None)
        above = min((known for known in self._seconds if known > size), default=None)
        if below is None or above is None:
            return self._seconds[below if above is None else above]  # type: ignore[index]
        share = (size - below) / (above - below)
        return self._seconds[below] * (1 - share) + self._seconds[above] * share


class DraftController:
    """Chooses the number of guesses of each sequence of a step that only decodes."""

    def __init__(self) -> None:
        self.verify = StepCosts()  # by the tokens of the step
        self.draft = StepCosts()  # one guess of each of so many sequences

    def choose(
        self, available: Mapping[int, int], acceptance: Mapping[int, Acceptance], num_sequences: int
    ) -> dict[int, int]:
        """Guesses by sequence id.

        available: the most that can be had for each sequence. num_sequences: of the step, those without guesses too.
        """
        base = self.verify.of(num_sequences)
        if base is None:
            return {}
        # The best guesses first: the first of a sequence is always before its second.
        worth = sorted(
            (
                (acceptance[key].all_right(place + 1), -place, key)
                for key, most in available.items()
                for place in range(most)
            ),
            reverse=True,
        )
        draft_seconds = self.draft.of(len(available)) or 0.0
        expected, deepest = float(num_sequences), 0
        best_rate, best = expected / base * _LEAST_GAIN, 0
        for count, (gain, negative_place, _) in enumerate(worth, 1):
            expected += gain
            deepest = max(deepest, 1 - negative_place)
            seconds = (self.verify.of(num_sequences + count) or base) + deepest * draft_seconds
            if expected / seconds > best_rate:
                best_rate, best = expected / seconds, count
        chosen: dict[int, int] = {}
        for _, _, key in worth[:best]:
            chosen[key] = chosen.get(key, 0) + 1
        could_pay = self._could_pay(available, num_sequences, base, draft_seconds)
        for key in available.keys() - chosen.keys():
            own = acceptance[key]
            own.idle_steps += 1
            # Everybody's probes together must not be more than one sequence's would be.
            if could_pay and own.idle_steps > own.patience * len(available):
                chosen[key] = min(2, available[key])
        return chosen

    def _could_pay(self, available: Mapping[int, int], num_sequences: int, base: float, draft_seconds: float) -> bool:
        """Whether guesses would be worth their costs if all were right: else there is nothing to find out."""
        best = 0.0
        for depth in range(1, max(available.values(), default=0) + 1):
            tokens = num_sequences + sum(min(depth, most) for most in available.values())
            best = max(best, tokens / ((self.verify.of(tokens) or base) + depth * draft_seconds))
        return best > num_sequences / base * _LEAST_HOPE


def predicted_speedup(chance: float, num_drafts: int, decode: float, verify: float, draft: float) -> float:
    """Tokens a second with so many guesses a step over those without (arXiv:2211.17192, theorem 3.8).

    decode, verify, draft: seconds of a step without guesses, of one that verifies them, of guessing all of them.
    """
    expected = sum(chance**place for place in range(num_drafts + 1))
    return expected * decode / (verify + draft)


def _rounded(num_tokens: int) -> int:
    """Sizes that are learned together: every one to 16, then every eighth of a power of two."""
    if num_tokens <= 16:
        return num_tokens
    unit = 1 << (num_tokens.bit_length() - 4)
    return -(-num_tokens // unit) * unit
