"""How many tokens to guess for each sequence in the next step, so that the batch makes most tokens a second.

A guess is worth the chance that it and all before it are right, and costs what the step takes longer for another token.
Both are learned: the chance from each sequence's own guesses, the seconds from steps of so many tokens. A step in which
every sequence has as many guesses is another kind than one in which they differ, and may take half as long; so the
number of guesses that would be best for each is compared with the one that would be best for all.

Where no guess pays there are none, but for one now and then that finds out whether that has changed.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.step_costs import STRANGE, Cost, StepCosts, rounded

_PRIOR, _PRIOR_WEIGHT = 0.6, 4.0  # a chance before anything is known of it, and how many guesses that counts
_FORGETTING = 0.96  # what a guess counts once there is another after it, and so on
_WELL_KNOWN = 10  # times that a step was seen before it tells how fast the machine is
_PACE_LEARNING = 0.3  # of a step in how fast the machine is just now
_LEAST_GAIN = 1.03  # more tokens a second than without guesses, lest noise decide
_LEAST_GAIN_OF_SEVERAL = 1.06  # answers that began together end apart then, and the last ones make a small batch
_LEAST_HOPE = 1.15  # the same, of guesses that are all right, for one to be tried now and then
_REST = 8  # steps for which it is thought to be as before, where guesses of all of so many sequences did not pay
_RESTING_SEQUENCES = 4
_PROBE_FIRST, _PROBE_LAST = 16, 256  # steps without a guess before one is tried
_CLEAR_GAIN = 1.5  # with so many more tokens a second it does not matter what a step without guesses takes exactly
_LONGEST_RUN = 32  # steps with guesses, else, before one without shows what that takes by now


@dataclass(slots=True)
class Acceptance:
    """The chance that a sequence's first guess of a step is right, and that a later one is if those before it are.

    They differ: a first guess follows a token that was hard to guess, and so is likelier to be an easy one.
    forgetting: the share that is kept of what was known, at each further guess.
    """

    right: list[float] = field(default_factory=lambda: [_PRIOR * _PRIOR_WEIGHT] * 2)
    tried: list[float] = field(default_factory=lambda: [_PRIOR_WEIGHT] * 2)
    idle_steps: int = 0
    patience: int = _PROBE_FIRST
    forgetting: float = _FORGETTING

    def of_another(self) -> "Acceptance":
        """What to think of a sequence of which nothing is known, if this is what is known of others."""
        weights = [_PRIOR_WEIGHT] * 2
        rights = zip(self.right, self.tried, weights, strict=True)
        return Acceptance([right / tried * weight for right, tried, weight in rights], weights)

    def chances(self, count: int) -> list[float]:
        """The chance that the first guess of a step is right, that the first two are, and so on to all `count`."""
        first, later = (min(0.98, right / tried) for right, tried in zip(self.right, self.tried, strict=True))
        return [first * later**place for place in range(count)]

    def observe(self, num_drafts: int, num_right: int) -> None:
        """Of `num_drafts` guesses the first `num_right` were right, the next one, if any, was wrong, others unknown."""
        known = num_right + (num_right < num_drafts)
        firsts = (min(num_right, 1), 1), (max(0, num_right - 1), known - 1)
        for place, (right, tried) in enumerate(firsts):
            weight = self.forgetting**tried
            self.right[place] = self.right[place] * weight + right
            self.tried[place] = self.tried[place] * weight + tried
        if self.idle_steps:  # this was a probe
            self.patience = _PROBE_FIRST if num_right else min(_PROBE_LAST, 2 * self.patience)
            self.idle_steps = 0


class _Step(NamedTuple):
    """What is chosen for.

    chances: of all guesses that can be had for a sequence, as in `Acceptance.chances`. base: seconds without guesses.
    draft_seconds: of a guess of each. behind: seconds to make up for what a draft model has not computed of a sequence.
    """

    chances: Mapping[int, list[float]]
    num_sequences: int
    base: float
    draft_seconds: float
    behind: Mapping[int, float]

    @property
    def rate(self) -> float:
        """Tokens a second without guesses."""
        return self.num_sequences / self.base

    @property
    def least_rate(self) -> float:
        """Tokens a second that guesses are to bring."""
        return self.rate * (_LEAST_GAIN if self.num_sequences == 1 else _LEAST_GAIN_OF_SEVERAL)

    @property
    def can_be_uniform(self) -> bool:
        return len(self.chances) == self.num_sequences


class DraftController:
    """Chooses the number of guesses of each sequence of a step that only decodes.

    All costs are as if the machine were always as fast: how fast it is just now is learned from every step, and taken
    out, or two costs that were learned at different times could not be compared.

    uniform: of steps in which each sequence has as many tokens, by the tokens of the step. ragged: of others.
    draft: one guess of each of so many sequences.
    catch_up: for each token that a draft model has not computed, and must before it guesses; None before any was.
    pace: what a step takes now, of what it takes usually.
    """

    def __init__(self) -> None:
        self.uniform = StepCosts()
        self.ragged = StepCosts()
        self.draft = StepCosts()
        self.catch_up: Cost | None = None
        self.pace = 1.0
        self._run = 0  # steps with guesses since the last one without
        self._rest, self._resting = 0, 0  # steps that are not thought about, if they are of so many sequences

    def observe_step(self, num_tokens: int, seconds: float, *, is_uniform: bool) -> None:
        """Learn from a step that only decoded or verified."""
        costs = self.uniform if is_uniform else self.ragged
        usual = costs.known(num_tokens, _WELL_KNOWN)
        if usual is not None:
            apart = max(1 - STRANGE, min(1 + STRANGE, seconds / usual / self.pace))
            self.pace *= 1 + _PACE_LEARNING * (apart - 1)
        costs.observe(num_tokens, seconds / self.pace)

    def observe_draft(self, num_sequences: int, seconds: float) -> None:
        """Learn from a guess of each of so many sequences."""
        self.draft.observe(num_sequences, seconds / self.pace)

    def observe_catch_up(self, num_tokens: int, seconds: float) -> None:
        """Learn from a draft model that computed so many tokens before it guessed."""
        each = seconds / num_tokens / self.pace
        if self.catch_up is None:
            self.catch_up = Cost(each)
        else:
            self.catch_up.observe(each)

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
        base = self.uniform.of(num_sequences)
        if base is None:
            return {}
        if self._rest and self._resting == len(available) == num_sequences:
            self._rest -= 1
            for key in available:
                acceptance[key].idle_steps += 1
            return {}
        catching_up = self.catch_up.seconds if self.catch_up is not None else 0.0
        behind = {key: count * catching_up for key, count in (behind or {}).items()}
        chances = {key: acceptance[key].chances(count) for key, count in available.items()}
        step = _Step(chances, num_sequences, base, self.draft.of(len(available)) or 0.0, behind)
        # This runs before each step: most of a large batch end here.
        most = max((each[0] for each in chances.values()), default=0.0)
        rate, chosen = self._best(step) if self._best_rate(step, most) > step.least_rate else (0.0, {})
        self._run = self._run + 1 if chosen else 0
        rests = not chosen and len(available) == num_sequences >= _RESTING_SEQUENCES
        self._rest, self._resting = (_REST if rests else 0), num_sequences
        if self._run > _LONGEST_RUN and rate < step.rate * _CLEAR_GAIN:
            self._run = 0
            return {}
        due = []
        for key in available.keys() - chosen.keys():
            own = acceptance[key]
            own.idle_steps += 1
            # Everybody's probes together must not be more than one sequence's would be.
            if own.idle_steps > own.patience * len(available):
                due.append(key)
        if due and self._best_rate(step, 1.0) <= step.rate * _LEAST_HOPE:
            for key in due:  # not asked again before as long
                acceptance[key].idle_steps = 1
        elif due and step.can_be_uniform and not chosen:  # costs less than guesses of one, and says more
            return dict.fromkeys(available, 1)
        else:
            chosen.update((key, min(2, available[key])) for key in due)
        return chosen

    def _best(self, step: _Step) -> tuple[float, dict[int, int]]:
        """The guesses that make most tokens a second, and how many; none where that is hardly more than without."""
        rate, chosen = max(self._best_of_each(step), self._best_of_all(step), key=lambda found: found[0])
        return (rate, chosen) if rate > step.least_rate else (0.0, {})

    def _best_of_each(self, step: _Step) -> tuple[float, dict[int, int]]:
        """Tokens a second where those guesses come first that are likeliest to stand, and which."""
        # The first of a sequence is always before its second.
        worth = sorted(
            ((chance, -place, key) for key, chances in step.chances.items() for place, chance in enumerate(chances)),
            reverse=True,
        )
        sizes = list(range(step.num_sequences + 1, step.num_sequences + 1 + len(worth)))
        alike, differing = (self._verifying(sizes, step.base, is_uniform=is_uniform) for is_uniform in (True, False))
        expected, deepest, catching_up = float(step.num_sequences), 0, 0.0
        best_rate, best = 0.0, 0
        for count, (gain, negative_place, key) in enumerate(worth, 1):
            expected += gain
            deepest = max(deepest, 1 - negative_place)
            if negative_place == 0:
                catching_up += step.behind.get(key, 0.0)
            seconds = (alike if count == deepest * step.num_sequences else differing)[count - 1]
            rate = expected / (seconds + deepest * step.draft_seconds + catching_up)
            if rate > best_rate:
                best_rate, best = rate, count
        chosen: dict[int, int] = {}
        for _, _, key in worth[:best]:
            chosen[key] = chosen.get(key, 0) + 1
        return best_rate, chosen

    def _best_of_all(self, step: _Step) -> tuple[float, dict[int, int]]:
        """Tokens a second with as many guesses of each sequence, and how many."""
        expected, best_rate, best = float(step.num_sequences), 0.0, 0
        catching_up = sum(step.behind.get(key, 0.0) for key in step.chances)
        depths = range(1, 1 + min(map(len, step.chances.values()))) if step.can_be_uniform else ()
        verifying = self._verifying([step.num_sequences * (1 + depth) for depth in depths], step.base, is_uniform=True)
        for depth, seconds in zip(depths, verifying, strict=True):
            expected += sum(chances[depth - 1] for chances in step.chances.values())
            rate = expected / (seconds + depth * step.draft_seconds + catching_up)
            if rate > best_rate:
                best_rate, best = rate, depth
        return best_rate, dict.fromkeys(step.chances, best)

    def _best_rate(self, step: _Step, chance: float) -> float:
        """Most tokens a second, if every guess were right with that chance, whatever those before it were."""
        width = max(1, len(step.chances))
        sizes, runs = _sizes_to_look_at(step.num_sequences, sum(map(len, step.chances.values())), width)
        quickest = map(min, *(self._verifying(sizes, step.base, is_uniform=is_uniform) for is_uniform in (True, False)))
        rates = (
            (step.num_sequences + chance * (size - step.num_sequences)) / (seconds + count * step.draft_seconds)
            for size, count, seconds in zip(sizes, runs, quickest, strict=True)
        )
        return max(rates, default=0.0)

    def _verifying(self, num_tokens: list[int], base: float, *, is_uniform: bool) -> list[float]:
        """Seconds of steps of more tokens than one that takes `base`: they only seem to be faster."""
        # Where none that differ were seen they are tried.
        costs = self.uniform if is_uniform or not self.ragged else self.ragged
        return [max(base, seconds) for seconds in costs.of_each(num_tokens)]


@functools.lru_cache(maxsize=1024)
def _sizes_to_look_at(num_sequences: int, num_guesses: int, width: int) -> tuple[list[int], list[int]]:
    """Tokens of the steps among which one is the fastest, and how often the draft model runs for each at least.

    Of sizes that cost the same the largest is the best, unless the draft model has to run once more for it.
    """
    largest = num_sequences + num_guesses
    sizes = {min(largest, rounded(size)) for size in range(num_sequences + 1, largest + 1)}
    sizes.update(range(num_sequences + width, largest, width))
    ordered = sorted(sizes)
    return ordered, [-(-(size - num_sequences) // width) for size in ordered]


def predicted_speedup(chance: float, num_drafts: int, decode: float, verify: float, draft: float) -> float:
    """Tokens a second with so many guesses a step over those without (arXiv:2211.17192, theorem 3.8).

    decode, verify, draft: seconds of a step without guesses, of one that verifies them, of guessing all of them.
    """
    expected = sum(chance**place for place in range(num_drafts + 1))
    return expected * decode / (verify + draft)
