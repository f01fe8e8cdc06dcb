"""Measured seconds of steps, by their size."""

from collections import deque
from statistics import median_low

import numpy as np
from jaxtyping import Float, Int

_NUM_SAMPLES = 8  # of each size; half of them make an estimate, for the first ones may include compilation


class StepCosts:
    """The median seconds of the last steps of each size, interpolated between sizes.

    A step larger than all measured ones is assumed to take as long as the largest, so that it is tried.
    """

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._sizes: list[int] = []  # of the medians, in ascending order
        self._seconds: list[float] = []

    def __bool__(self) -> bool:
        return bool(self._sizes)

    def observe(self, size: int, seconds: float) -> None:
        """Record a step of a size."""
        size = bucket(size)
        samples = self._samples.setdefault(size, deque(maxlen=_NUM_SAMPLES))
        samples.append(seconds)
        if len(samples) >= _NUM_SAMPLES // 2:
            self._medians[size] = median_low(samples)
            self._sizes, self._seconds = map(list, zip(*sorted(self._medians.items()), strict=True))

    def median(self, size: int) -> float | None:
        """Return the seconds of a step of a size, if enough of that size were measured."""
        return self._medians.get(bucket(size))

    def estimate(self, size: int) -> float:
        """Return the seconds of a step of a size. At least one size must have been measured."""
        return float(np.interp(size, self._sizes, self._seconds))

    def estimate_each(self, sizes: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """Return the seconds of steps of each size. At least one size must have been measured."""
        return np.interp(sizes, self._sizes, self._seconds)


def bucket(size: int) -> int:
    """Return the size with which `size` is measured: exact up to 16, then the next eighth of a power of two."""
    unit = 1 << max(0, size.bit_length() - 4)
    return -(-size // unit) * unit
