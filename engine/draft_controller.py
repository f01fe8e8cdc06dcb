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
        self._seconds[size] = _learned(self._seconds.get(size), seconds)

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
    """Chooses the number of guesses of each sequence of a step that only decodes.

    catch_up: seconds for each token that a draft model has not computed, and must before it guesses; None before any
    was.
    """

    def __init__(self) -> None:
        self.verify = StepCosts()  # by the tokens of the step
        self.draft = StepCosts()  # one guess of each of so many sequences
        self.catch_up: float | None = None

    def observe_catch_up(self, num_tokens: int, seconds: float) -> None:
        """Learn from a draft model that computed so many tokens before it guessed."""
        self.catch_up = _learned(self.catch_up, seconds / num_tokens)

    def choose(
        self,
        available: Mapping[int, int],
        acceptance: Mapping[int, Acceptance],
        num_sequences: int,
        behind: Mapping[int, float] | None = None,
    ) -> dict[int, int]:
        """Guesses by sequence id.

        available: the most that can be had for each sequence. num_sequences: of the step, those without guesses too.
        behind: tokens that a draft model must compute before it guesses for a sequence, for each step that may follow.
        """
        base = self.verify.of(num_sequences)
        if base is None:
            return {}
        draft_seconds = self.draft.of(len(available)) or 0.0
        # Most steps of a large batch end here: this runs before each of them.
        most = max((acceptance[key].all_right(1) for key in available), default=0.0)
        chosen: dict[int, int] = {}
        if self._best_rate(available, num_sequences, base, draft_seconds, most) > num_sequences / base * _LEAST_GAIN:
            chosen = self._best(available, acceptance, num_sequences, base, draft_seconds, behind or {})
        could_pay: bool | None = None
        for key in available.keys() - chosen.keys():
            own = acceptance[key]
            own.idle_steps += 1
            # Everybody's probes together must not be more than one sequence's would be.
            if own.idle_steps > own.patience * len(available):
                if could_pay is None:
                    best = self._best_rate(available, num_sequences, base, draft_seconds, 1.0)
                    could_pay = best > num_sequences / base * _LEAST_HOPE
                if could_pay:
                    chosen[key] = min(2, available[key])
        return chosen

    def _best(
        self,
        available: Mapping[int, int],
        acceptance: Mapping[int, Acceptance],
        num_sequences: int,
        base: float,
        draft_seconds: float,
        behind: Mapping[int, float],
    ) -> dict[int, int]:
        """The guesses that make most tokens a second; none where that is hardly more than without."""
        # The best guesses first: the first of a sequence is always before its second.
        worth = sorted(
            (
                (acceptance[key].all_right(place + 1), -place, key)
                for key, most in available.items()
                for place in range(most)
            ),
            reverse=True,
        )
        expected, deepest, catching_up = float(num_sequences), 0, 0.0
        best_rate, best = expected / base * _LEAST_GAIN, 0
        for count, (gain, negative_place, key) in enumerate(worth, 1):
            expected += gain
            deepest = max(deepest, 1 - negative_place)
            if negative_place == 0:
                catching_up += behind.get(key, 0.0) * (self.catch_up or 0.0)
            seconds = self._verifying(num_sequences + count, base) + deepest * draft_seconds + catching_up
            if expected / seconds > best_rate:
                best_rate, best = expected / seconds, count
        chosen: dict[int, int] = {}
        for _, _, key in worth[:best]:
            chosen[key] = chosen.get(key, 0) + 1
        return chosen

    def _best_rate(
        self, available: Mapping[int, int], num_sequences: int, base: float, draft_seconds: float, chance: float
    ) -> float:
        """Most tokens a second, if every guess were right with that chance, whatever those before it were."""
        width = max(1, len(available))
        largest = num_sequences + sum(available.values())
        # Of sizes that cost the same the largest is the best, unless the draft model has to run once more for it.
        sizes = {min(largest, _rounded(size)) for size in range(num_sequences + 1, largest + 1)}
        sizes.update(range(num_sequences + width, largest, width))
        return max(
            (
                (num_sequences + chance * (size - num_sequences))
                / (self._verifying(size, base) + -(-(size - num_sequences) // width) * draft_seconds)
                for size in sizes
            ),
            default=0.0,
        )

    def _verifying(self, num_tokens: int, base: float) -> float:
        """Seconds of a step of more tokens than one that takes `base`: it only seems to be faster."""
        return max(base, self.verify.of(num_tokens) or base)


def predicted_speedup(chance: float, num_drafts: int, decode: float, verify: float, draft: float) -> float:
    """Tokens a second with so many guesses a step over those without (arXiv:2211.17192, theorem 3.8).

    decode, verify, draft: seconds of a step without guesses, of one that verifies them, of guessing all of them.
    """
    expected = sum(chance**place for place in range(num_drafts + 1))
    return expected * decode / (verify + draft)


def _learned(old: float | None, seconds: float) -> float:
    # One time that something else held up says little.
    return seconds if old is None else old + _LEARNING * (min(seconds, 2 * old) - old)


def _rounded(num_tokens: int) -> int:
    """Sizes that are learned together: every one to 16, then every eighth of a power of two."""
    if num_tokens <= 16:
        return num_tokens
    unit = 1 << (num_tokens.bit_length() - 4)
    return -(-num_tokens // unit) * unit
