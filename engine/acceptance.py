"""How likely a sequence's guesses are to stand, learned from those before."""

from dataclasses import dataclass, field

_PRIOR, _PRIOR_WEIGHT = 0.6, 4.0  # a chance before anything is known of it, and how many guesses that counts
_OTHERS_WEIGHT = 10.0  # guesses that others' chance counts as a sequence's own, before it has any
_FORGETTING = 0.96  # what a guess counts once there is another after it, and so on


@dataclass(slots=True)
class Acceptance:
    """The chance that a sequence's first guess of a step is right, and that a later one is if those before it are.

    They differ: a first guess follows a token that was hard to guess, and so is likelier to be an easy one.
    idle_steps: for which guesses of it were thought about, since it last had any. forgetting: the share that is kept of
    what was known, at each further guess.
    """

    right: list[float] = field(default_factory=lambda: [_PRIOR * _PRIOR_WEIGHT] * 2)
    tried: list[float] = field(default_factory=lambda: [_PRIOR_WEIGHT] * 2)
    idle_steps: int = 0
    forgetting: float = _FORGETTING

    def of_another(self) -> "Acceptance":
        """What to think of a sequence of which nothing is known, if this is what is known of others."""
        rights = [right / tried * _OTHERS_WEIGHT for right, tried in zip(self.right, self.tried, strict=True)]
        return Acceptance(rights, [_OTHERS_WEIGHT] * 2)

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
        self.idle_steps = 0
