"""How many tokens to guess for each sequence in the next step, so that the batch makes most tokens a second.

A guess is worth the chance that it and all before it are right, and costs what the step takes longer for another token.
Both are learned: the chance from each sequence's own guesses, the seconds from steps of so many tokens. A step in which
every sequence has as many guesses is another kind than one in which they differ, and may take half as long; so the
number of guesses that would be best for each is compared with the one that would be best for all.

A draft model must compute what it has missed before it guesses, which has to pay off in the steps that follow: as many
as usual, when guesses were begun before. Where none pay, some are made now and then to find out whether that has
changed, for which there is a small part of the time and no more: see `ProbeBudget`. Most steps between are not planned.
"""

import functools
import math
from collections.abc import Mapping

from dispec.engine.speculation.acceptance import Acceptance
from dispec.engine.speculation.planned_step import Behind, PlannedStep
from dispec.engine.speculation.probe_budget import ProbeBudget
from dispec.engine.speculation.step_costs import STRANGE, WELL_KNOWN, StepCosts, rounded

_PACE_LEARNING = 0.3  # of a step in how fast the machine is just now
_LEAST_HOPE = 1.15  # with guesses that are all right, for some to be tried now and then
_WITHOUT_HOPE = 10  # times as seldom else: costs change as well, and may have been learned while something held them up
_LEAST_COST = 0.05  # of a step is what one counts that may bring more than it costs
_FURTHER = 0.5  # of the first guess is what another is thought to take before any was seen
_LEAST_FURTHER = 0.1  # and at least, lest one that was thought to be free stay so: costs change by shares of themselves
_MOST_MISSED = 10  # steps without guesses that a draft model may hold all sequences up for, before the first ones
_LARGEST_STRIDE = 2  # as many times the largest step that was seen is the largest that is tried
_FIRST_RUN, _RUN_LEARNING = 32.0, 0.1  # steps that go on with guesses once they began, and of a new run in that
_REST, _LONGEST_REST = 8, 32  # steps for which it is thought to be as before, where no sequence has any
_CLEAR_GAIN = 1.5  # with so many more tokens a second it does not matter what a step without guesses takes exactly
_LONGEST_RUN = 32  # steps with guesses, else, before one without shows what that takes by now


class DraftController:
    """Chooses the number of guesses of each sequence of a step that only decodes.

    All costs are as if the machine were always as fast, or two that were learned at different times could not be
    compared. How fast it is just now is learned from steps that follow others of their kind; it is taken out of what
    those take that follow others than their kind, and from these the costs are learned.

    uniform: of steps in which each sequence has as many tokens, by the tokens of the step. ragged: of others.
    draft, further_draft: the first guess of each of so many sequences, and each further one.
    catch_up: so many tokens that a draft model has missed, and must compute before it guesses.
    pace: what a step takes now, of what it takes usually.
    run_length: steps that usually go on with guesses, once they began because they were thought to pay.
    budget: for guesses that are not thought to pay.
    """

    def __init__(self) -> None:
        self.uniform = StepCosts()
        self.ragged = StepCosts()
        self.draft = StepCosts()
        self.further_draft = StepCosts()
        self.catch_up = StepCosts()
        self.pace = 1.0
        self.run_length = _FIRST_RUN
        self.budget = ProbeBudget()
        self._run = 0  # steps with guesses since the last one without
        self._begun, self._paused = 0, 0  # steps with guesses since they began, and without since the last of them
        self._last_kind: tuple[bool, int] | None = None
        self._rest, self._resting = 0, 0  # steps that are not thought about, if they are of so many sequences

    def observe_step(self, num_tokens: int, seconds: float, *, is_uniform: bool) -> None:
        """Learn from a step that only decoded or verified."""
        costs = self.uniform if is_uniform else self.ragged
        usual = costs.known(num_tokens, WELL_KNOWN)
        kind = is_uniform, rounded(num_tokens)
        if usual is None or kind != self._last_kind:
            costs.observe(num_tokens, seconds / self.pace)
        else:
            # One of many alike: that they take longer than they used to does not say how they compare with others.
            apart = max(1 - STRANGE, min(1 + STRANGE, seconds / usual / self.pace))
            self.pace *= 1 + _PACE_LEARNING * (apart - 1)
        self._last_kind = kind

    def observe_draft(self, num_sequences: int, runs: int, seconds: float) -> None:
        """Learn from so many guesses of each of so many sequences, one after another."""
        first = self.draft.known(num_sequences)
        if runs == 1 or first is None:
            self.draft.observe(num_sequences, seconds / self.pace / runs)
        else:
            further = (seconds / self.pace - first) / (runs - 1)
            self.further_draft.observe(num_sequences, max(_LEAST_FURTHER * first, further))

    def observe_catch_up(self, num_tokens: int, seconds: float) -> None:
        """Learn from a draft model that computed so many tokens before it guessed."""
        self.catch_up.observe(num_tokens, seconds / self.pace)

    def is_resting(self, num_sequences: int) -> bool:
        """Return whether a step of so many sequences, that all can have draft tokens, is planned to have none."""
        return self._rest > 0 and self._resting == num_sequences

    def rests(self, num_sequences: int) -> bool:
        """The same for the next step, which is taken off the plan."""
        if not self.is_resting(num_sequences):
            return False
        self.budget.earn(self.uniform.of(num_sequences) or 0.0)
        self._rest -= 1
        self._count_run({})
        return True

    def choose(
        self,
        available: Mapping[int, int],
        acceptance: Mapping[int, Acceptance],
        num_sequences: int,
        behind: Mapping[int, Behind] | None = None,
    ) -> dict[int, int]:
        """Guesses by sequence id.

        available: the most that can be had for each sequence. num_sequences: of the step, those without guesses too.
        behind: of those sequences of which a draft model has missed something.
        """
        base = self.uniform.of(num_sequences)
        if base is None:
            return {}
        for key in available:
            acceptance[key].idle_steps += 1  # until a guess is seen
        if available:
            self.budget.earn(base)
        behind = behind or {}
        missed = dict(zip(behind, self.catch_up.extended([own.tokens for own in behind.values()]), strict=True))
        spread = {
            key: seconds / max(1.0, min(self.run_length, behind[key].remaining)) for key, seconds in missed.items()
        }
        chances = {key: acceptance[key].chances(count) for key, count in available.items()}
        first_guess = self.draft.of(len(available)) or 0.0
        further_guess = self.further_draft.of(len(available))
        if further_guess is None:
            further_guess = _FURTHER * first_guess
        step = PlannedStep(chances, num_sequences, base, first_guess, further_guess, spread, self._begun > 0)
        # This runs before each step: most of a large batch end here.
        most = max((each[0] for each in chances.values()), default=0.0)
        rate, chosen = self._best(step) if self._best_rate(step, most) > step.least_rate else (0.0, {})
        self._count_run(chosen)
        self._rest = 0
        if self._run > _LONGEST_RUN and rate < step.rate * _CLEAR_GAIN:
            self._run = 0
            return {}
        return self._with_probe(step, chosen, available, acceptance, missed)

    def _count_run(self, chosen: Mapping[int, int]) -> None:
        """Take note of what is thought to pay; of a single step without guesses nothing is missed."""
        if chosen:
            self._run += 1
            self._begun, self._paused = self._begun + 1, 0
            return
        self._run = 0
        self._paused += 1
        if self._begun and self._paused > 1:
            self.run_length += _RUN_LEARNING * (self._begun - self.run_length)
            self._begun = 0

    def _with_probe(
        self,
        step: PlannedStep,
        chosen: dict[int, int],
        available: Mapping[int, int],
        acceptance: Mapping[int, Acceptance],
        missed: Mapping[int, float],
    ) -> dict[int, int]:
        """What was chosen, and guesses that are to find out whether more would pay, if there is the time for them."""
        idle = [key for key in available if key not in chosen]
        if not idle:
            return self._deeper(step, chosen) if chosen else chosen
        # All at once cost less than one alone, and say more, but for what a draft model may have missed of all.
        probed = dict.fromkeys(available, 1) if step.can_be_uniform and not chosen else {}
        longer = self._seconds(step, probed) - step.base
        size = 2 * step.num_sequences
        catching_up_all = sum(missed.values())
        is_bearable = bool(probed) and catching_up_all <= _MOST_MISSED * step.base
        is_new = is_bearable and self.budget.is_new(size, self.uniform.times(size))
        if not probed or (catching_up_all > longer and not is_new):
            least = min(idle, key=lambda key: (missed.get(key, 0.0), -acceptance[key].idle_steps))
            probed = {**chosen, least: min(2, available[least])}
        catching_up = sum(missed.get(key, 0.0) for key in probed.keys() - chosen.keys())
        cost = self._seconds(step, probed) - self._seconds(step, chosen) + catching_up
        if is_new and cost < math.inf:
            self.budget.explore(size)
            return probed
        if self._best_rate(step, 1.0) <= step.rate * _LEAST_HOPE:
            cost *= _WITHOUT_HOPE
        if self.budget.spend(cost):
            return probed
        if not chosen and step.can_be_uniform and cost < math.inf:
            # Without guesses nothing is learned of their chances; but there is more and more credit for some.
            rest = max(_REST, min(_LONGEST_REST, self.budget.steps_until(cost, step.base)))
            self._rest, self._resting = round(rest), step.num_sequences
        return chosen

    def _deeper(self, step: PlannedStep, chosen: dict[int, int]) -> dict[int, int]:
        """What was chosen, and now and then a further guess of each: else what is known of it stays as it was."""
        depth = max(chosen.values())
        probed = dict.fromkeys(chosen, depth + 1)
        if not step.can_be_uniform or any(depth + 1 > len(step.chances[key]) for key in chosen):
            return chosen
        # What it takes longer than the tokens are worth that it brings.
        more = sum(step.chances[key][depth] for key in chosen)
        seconds, longer = self._seconds(step, chosen), self._seconds(step, probed)
        cost = longer - seconds * (1 + more / step.expected(chosen))
        return probed if self.budget.spend(max(cost, _LEAST_COST * step.base)) else chosen

    def _seconds(self, step: PlannedStep, chosen: Mapping[int, int]) -> float:
        """Of a step with so many guesses, what a draft model has missed apart."""
        if not chosen:
            return step.base
        counts = [chosen.get(key, 0) for key in step.chances]
        is_uniform = step.can_be_uniform and len(set(counts)) == 1
        size = step.num_sequences + sum(counts)
        return self._verifying([size], step.base, is_uniform=is_uniform)[0] + step.guessing(max(counts))

    def _best(self, step: PlannedStep) -> tuple[float, dict[int, int]]:
        """The guesses that make most tokens a second, and how many; none where that is hardly more than without."""
        rate, chosen = self._best_of_all(step)
        if step.num_sequences > 1:
            rate, chosen = max(self._best_of_each(step), (rate, chosen), key=lambda found: found[0])
        return (rate, chosen) if rate > step.least_rate else (0.0, {})

    def _best_of_each(self, step: PlannedStep) -> tuple[float, dict[int, int]]:
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
            rate = expected / (seconds + step.guessing(deepest) + catching_up)
            if rate > best_rate:
                best_rate, best = rate, count
        chosen: dict[int, int] = {}
        for _, _, key in worth[:best]:
            chosen[key] = chosen.get(key, 0) + 1
        return best_rate, chosen

    def _best_of_all(self, step: PlannedStep) -> tuple[float, dict[int, int]]:
        """Tokens a second with as many guesses of each sequence, and how many."""
        expected, best_rate, best = float(step.num_sequences), 0.0, 0
        catching_up = sum(step.behind.get(key, 0.0) for key in step.chances)
        depths = range(1, 1 + min(map(len, step.chances.values()))) if step.can_be_uniform else ()
        verifying = self._verifying([step.num_sequences * (1 + depth) for depth in depths], step.base, is_uniform=True)
        for depth, seconds in zip(depths, verifying, strict=True):
            expected += sum(chances[depth - 1] for chances in step.chances.values())
            rate = expected / (seconds + step.guessing(depth) + catching_up)
            if rate > best_rate:
                best_rate, best = rate, depth
        return best_rate, dict.fromkeys(step.chances, best)

    def _best_rate(self, step: PlannedStep, chance: float) -> float:
        """Most tokens a second, if every guess were right with that chance, whatever those before it were."""
        width = max(1, len(step.chances))
        sizes, runs = _sizes_to_look_at(step.num_sequences, sum(map(len, step.chances.values())), width)
        quickest = map(min, *(self._verifying(sizes, step.base, is_uniform=is_uniform) for is_uniform in (True, False)))
        rates = (
            (step.num_sequences + chance * (size - step.num_sequences)) / (seconds + step.guessing(count))
            for size, count, seconds in zip(sizes, runs, quickest, strict=True)
        )
        return max(rates, default=0.0)

    def _verifying(self, num_tokens: list[int], base: float, *, is_uniform: bool) -> list[float]:
        """Seconds of steps of more tokens than one that takes `base`: they only seem to be faster."""
        # Where none that differ were seen they are tried.
        costs = self.uniform if is_uniform or not self.ragged else self.ragged
        most = _LARGEST_STRIDE * max(self.uniform.largest, self.ragged.largest)
        found = zip(num_tokens, costs.of_each(num_tokens), strict=True)
        return [max(base, seconds) if size <= most else math.inf for size, seconds in found]


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
