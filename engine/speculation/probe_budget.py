"""What guesses may cost that are not thought to pay, made to find out whether that has changed."""

from collections import Counter

from dispec.engine.speculation.step_costs import WELL_KNOWN

_PROBING = 0.005  # of the time may be spent on that
_PROBES_SAVED = 2  # as many of them may follow one another, when there was none for long


class ProbeBudget:
    """A small part of the time, and what that does not count: the first guesses of each scale of batch sizes.

    What those cost is to be learned in steps one after the other: a single one is slow, and all seem to be then. What
    is learned of one size tells enough of those near it.

    credit: seconds that may be spent. explored: first steps that were run, by the scale of their sizes.
    """

    def __init__(self) -> None:
        self.credit = 0.0
        self.explored: Counter[int] = Counter()

    def earn(self, seconds: float) -> None:
        """For a step of so many."""
        self.credit += _PROBING * seconds

    def steps_until(self, cost: float, seconds: float) -> float:
        """Steps of so many seconds each, until something of that cost can be had."""
        return (cost - self.credit) / (_PROBING * seconds)

    def spend(self, cost: float) -> bool:
        """Whether there is enough for that. What was saved up while nothing could be tried is not made up for."""
        if self.credit < cost:
            return False
        self.credit = min(self.credit, _PROBES_SAVED * cost) - cost
        return True

    def is_new(self, num_tokens: int, times_seen: int) -> bool:
        """Whether a step of so many tokens, seen so often, is yet to be learned, whatever it costs."""
        # What never comes to be seen, as where there is no memory for guesses, is not tried for ever.
        return max(times_seen, self.explored[num_tokens.bit_length()]) < WELL_KNOWN

    def explore(self, num_tokens: int) -> None:
        """Take note of such a step."""
        self.explored[num_tokens.bit_length()] += 1
