"""How likely a sequence's guesses are to stand, learned from those before."""

from dataclasses import dataclass, field

_PRIOR, _PRIOR_WEIGHT = 0.6, 4.0  # a chance before anything is known of it, and how many guesses that counts
_OTHERS_WEIGHT = 20.0  # guesses that others' chance counts as a sequence's own
_FORGETTING = 0.97  # what a guess counts once there is another after it, and so on


@dataclass(slots=True)
class Acceptance:
    """The chance that a sequence's first guess of a step is right, and that a later one is if those before it are.

    They differ: a first guess follows a token that was hard to guess, and so is likelier to be an easy one.
    prior: the chances before any guess, which count as `prior_weight` guesses for good: a few wrong ones in a row would
    end guesses, and hardly any would be made then that could show better. idle_steps: for which guesses of it were
    thought about, since it last had any. forgetting: the share that is kept of what was known, at each further guess.
    """

    right: list[float] = field(default_factory=lambda: [0.0, 0.0])
    tried: list[float] = field(default_factory=lambda: [0.0, 0.0])
    prior: tuple[float, float] = (_PRIOR, _PRIOR)
    prior_weight: float = _PRIOR_WEIGHT
    idle_steps: int = 0
    forgetting: float = _FORGETTING

    def of_another(self) -> "Acceptance":
        """What to think of a sequence of which nothing is known, if this is what is known of others."""
        return Acceptance(prior=self._first_and_later(), prior_weight=_OTHERS_WEIGHT)

    def chances(self, count: int) -> list[float]:
        """The chance that the first guess of a step is right, that the first two are, and so on to all `count`."""
        first, later = (min(0.98, chance) for chance in self._first_and_later())
        return [first * later**place for place in range(count)]

    def _first_and_later(self) -> tuple[float, float]:
        weight = self.prior_weight
        known = zip(self.prior, self.right, self.tried, strict=True)
        first, later = ((prior * weight + right) / (weight + tried) for prior, right, tried in known)
        return first, later

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """Learn from one verification: the first `num_accepted` of `num_drafts` draft tokens were accepted."""
        known = num_accepted + (num_accepted < num_drafts)
        firsts = (min(num_accepted, 1), 1), (max(0, num_accepted - 1), known - 1)
        for place, (right, tried) in enumerate(firsts):
            weight = self.forgetting**tried
            self.right[place] = self.right[place] * weight + right
            self.tried[place] = self.tried[place] * weight + tried
        self.idle_steps = 0
