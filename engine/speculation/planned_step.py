"""What is known of a step before it is decided how many tokens are guessed for it."""

from collections.abc import Mapping
from typing import NamedTuple

_LEAST_GAIN = 1.03  # more tokens a second than without guesses, lest noise decide
_LEAST_GAIN_OF_SEVERAL = 1.06  # answers that began together end apart then, and the last ones make a small batch
_LEAST_GAIN_TO_GO_ON = 1.02  # it costs something to begin, and what is known of chances comes and goes


class Behind(NamedTuple):
    """What a draft model has missed of a sequence: tokens to compute before it guesses, and steps that may follow."""

    tokens: int
    remaining: int


class PlannedStep(NamedTuple):
    """A step for which a number of guesses is to be chosen, and what is known of it.

    chances: of all guesses that can be had for a sequence, as in `Acceptance.chances`. base: seconds without guesses.
    first_guess, further_guess: seconds of the first guess of each sequence, and of each further one. behind: seconds to
    make up for what a draft model has missed of a sequence, spread over the steps that are thought to follow. goes_on:
    the steps before had guesses.
    """

    chances: Mapping[int, list[float]]
    num_sequences: int
    base: float
    first_guess: float
    further_guess: float
    behind: Mapping[int, float]
    goes_on: bool

    def guessing(self, runs: int) -> float:
        """Seconds of so many guesses, one after another."""
        return self.first_guess + (runs - 1) * self.further_guess if runs else 0.0

    def expected(self, chosen: Mapping[int, int]) -> float:
        """Tokens of the step with so many guesses."""
        return self.num_sequences + sum(sum(self.chances[key][:count]) for key, count in chosen.items())

    @property
    def rate(self) -> float:
        """Tokens a second without guesses."""
        return self.num_sequences / self.base

    @property
    def least_rate(self) -> float:
        """Tokens a second that guesses are to bring."""
        gain = _LEAST_GAIN if self.num_sequences == 1 else _LEAST_GAIN_OF_SEVERAL
        return self.rate * (_LEAST_GAIN_TO_GO_ON if self.goes_on else gain)

    @property
    def can_be_uniform(self) -> bool:
        return len(self.chances) == self.num_sequences
