"""What steps cost: seconds that are learned from each that was run."""

import bisect
from dataclasses import dataclass

import numpy as np

_LEARNING = 0.1  # of a new time in the mean of a cost, at least
_FIRST_TIMES = 3  # of which the least counts: they may include what is done once
_QUICK_TIMES = 3  # in a row that are far less than a cost, for it to be what the last of them was
_HOPED_LESS = 0.1  # for each of the first times that are still to come, or what was slow once is never tried again
WELL_KNOWN = 10  # times that a step was seen before it tells how fast the machine is
STRANGE = 0.3  # how far off what is usual a time may be; something else held up what is farther off


@dataclass(slots=True)
class Cost:
    """Seconds of something that is done again and again: a mean that follows slowly, and no single time far.

    quick: times in a row that were far less. Nothing makes a step quick by chance: if there are some, it was the mean
    that something had held up.
    """

    seconds: float
    times: int = 1
    quick: int = 0

    @property
    def hoped(self) -> float:
        """What it may turn out to be, once it was seen a few times."""
        return self.seconds * (1 - _HOPED_LESS * max(0, _FIRST_TIMES - self.times))

    def observe(self, seconds: float) -> None:
        self.times += 1
        self.quick = self.quick + 1 if seconds < (1 - STRANGE) * self.seconds else 0
        if self.times <= _FIRST_TIMES:
            self.seconds = min(self.seconds, seconds)
        elif self.quick >= _QUICK_TIMES:
            self.seconds, self.quick = seconds, 0
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
        self._asked: dict[tuple[int, ...], list[float]] = {}  # since anything was learned

    def observe(self, num_tokens: int, seconds: float) -> None:
        self._asked.clear()
        size = rounded(num_tokens)
        if size in self._costs:
            self._costs[size].observe(seconds)
        else:
            self._costs[size] = Cost(seconds)
            bisect.insort(self._sizes, size)

    def __bool__(self) -> bool:
        """Whether any step was seen."""
        return bool(self._sizes)

    @property
    def largest(self) -> int:
        """Tokens of the largest step that was seen; 0 if none was."""
        return self._sizes[-1] if self else 0

    def of(self, num_tokens: int) -> float | None:
        """None while no step was seen."""
        found = self.known(num_tokens)
        return found if found is not None or not self else self.of_each([num_tokens])[0]

    def known(self, num_tokens: int, times: int = 1) -> float | None:
        """Of steps that were seen so many times, and of those that are learned together with them."""
        cost = self._costs.get(rounded(num_tokens))
        return None if cost is None or cost.times < times else cost.seconds

    def times(self, num_tokens: int) -> int:
        """How often such a step was seen."""
        cost = self._costs.get(rounded(num_tokens))
        return 0 if cost is None else cost.times

    def of_each(self, num_tokens: list[int]) -> list[float]:
        """Of several numbers of tokens, what they may turn out to be. Some step must have been seen."""
        asked = tuple(num_tokens)
        found = self._asked.get(asked)
        if found is None:
            sizes = [rounded(number) for number in num_tokens]
            found = np.interp(sizes, self._sizes, [self._costs[size].hoped for size in self._sizes]).tolist()
            self._asked[asked] = found
        return found

    def extended(self, num_tokens: list[int]) -> list[float]:
        """As `of_each`, but beyond the largest as much for each token; zero for nothing, and while no step was seen."""
        if not self or not any(num_tokens):
            return [0.0] * len(num_tokens)
        found = zip(num_tokens, self.of_each(num_tokens), strict=True)
        return [seconds * max(1.0, number / self.largest) if number else 0.0 for number, seconds in found]


def rounded(num_tokens: int) -> int:
    """Sizes that are learned together: every one to 16, then every eighth of a power of two."""
    if num_tokens <= 16:
        return num_tokens
    unit = 1 << (num_tokens.bit_length() - 4)
    return -(-num_tokens // unit) * unit
