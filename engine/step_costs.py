"""What steps cost: seconds that are learned from each that was run."""

import bisect
from dataclasses import dataclass

import numpy as np

_LEARNING = 0.05  # of a new time in the mean of a cost, at least
_FIRST_TIMES = 3  # of which the least counts: they may include what is done once
STRANGE = 0.3  # how far off what is usual a time may be; something else held up what is farther off


@dataclass(slots=True)
class Cost:
    """Seconds of something that is done again and again: a mean that follows slowly, and no single time far."""

    seconds: float
    times: int = 1

    def observe(self, seconds: float) -> None:
        self.times += 1
        if self.times <= _FIRST_TIMES:
            self.seconds = min(self.seconds, seconds)
        else:
            most = STRANGE * self.seconds
            self.seconds += max(_LEARNING, 1 / self.times) * max(-most, min(most, seconds - self.seconds))


class StepCosts:
    """Seconds of a step by the number of its tokens, on straight lines between those that were seen.

    Beyond the largest that was seen a token is thought to be free: it is tried.
    """

    def __init__(self) -> None:
        self._costs: dict[int, Cost] = {}
        self._sizes: list[int] = []

    def observe(self, num_tokens: int, seconds: float) -> None:
        size = rounded(num_tokens)
        if size in self._costs:
            self._costs[size].observe(seconds)
        else:
            self._costs[size] = Cost(seconds)
            bisect.insort(self._sizes, size)

    def __bool__(self) -> bool:
        """Whether any step was seen."""
        return bool(self._sizes)

    def of(self, num_tokens: int) -> float | None:
        """None while no step was seen."""
        found = self.known(num_tokens)
        return found if found is not None or not self else self.of_each([num_tokens])[0]

    def known(self, num_tokens: int, times: int = 1) -> float | None:
        """Of steps that were seen so many times, and of those that are learned together with them."""
        cost = self._costs.get(rounded(num_tokens))
        return None if cost is None or cost.times < times else cost.seconds

    def of_each(self, num_tokens: list[int]) -> list[float]:
        """Of several numbers of tokens. Some step must have been seen."""
        sizes = [rounded(number) for number in num_tokens]
        found: list[float] = np.interp(sizes, self._sizes, [self._costs[size].seconds for size in self._sizes]).tolist()
        return found


def rounded(num_tokens: int) -> int:
    """Sizes that are learned together: every one to 16, then every eighth of a power of two."""
    if num_tokens <= 16:
        return num_tokens
    unit = 1 << (num_tokens.bit_length() - 4)
    return -(-num_tokens // unit) * unit
