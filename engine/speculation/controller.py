"""The number of draft tokens in a step: the one with the most expected tokens per second.

All sequences get the same number, as far as they have draft tokens: a step in which they differ may take twice as long.
Expected tokens follow from each sequence's acceptance rate, seconds from the measured costs of steps. A probe, a few
steps with one draft token more or less or with none, keeps both current; the time that probes lose is bounded.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dispec.engine.speculation.step_costs import StepCosts, bucket

_MIN_GAIN = 1.05  # tokens per second over decoding without draft tokens, for drafting to start
_HORIZON = 32  # steps over which catching up must pay off, and for which a decision not to draft may hold
_PROBE_SHARE = 0.01  # of the time, which probes may lose
_PROBE_STEPS = 8  # the first step after a change is slower, and one step tells little about acceptance
_PACE_WEIGHT = 0.3  # weight of a step in the moving average of the machine's pace
_ACCEPTANCE_WEIGHT = 0.05  # weight of a draft token in a sequence's acceptance rate; a tenth in that of all sequences


class Candidate(NamedTuple):
    """A sequence that can have draft tokens.

    num_missing_tokens: tokens that the draft model must compute before it drafts.
    num_remaining_tokens: most tokens that the sequence has yet to generate.
    """

    max_drafts: int
    acceptance_rate: float
    num_missing_tokens: int = 0
    num_remaining_tokens: int = _HORIZON


class DraftController:
    """Chooses the number of draft tokens per sequence of a step that only decodes.

    A controller that decides not to draft rests: the decision holds for up to 32 steps with as many sequences.

    acceptance_rate: of all sequences together; a new sequence starts with it.
    pace: seconds of a step now, relative to its recorded cost. Costs are recorded divided by it: costs measured while
        other processes slowed the machine down then compare with earlier ones.
    """

    def __init__(self) -> None:
        self.acceptance_rate = 0.6
        self.pace = 1.0
        self._verify = {True: StepCosts(), False: StepCosts()}  # by the step's tokens; uniform steps and others
        self._draft: dict[int, StepCosts] = {}  # by sequences, for each number of draft tokens
        self._catch_up_seconds = 0.0  # per token
        self._last_kind: tuple[bool, int] | None = None
        self._largest_step = 0
        self._num_draft_tokens = 0  # last chosen
        self._probe, self._num_probe_steps, self._num_probes = 0, 0, 0
        self._credit = 0.0  # seconds that probes may lose
        self._num_resting_steps, self._num_resting_sequences = 0, 0

    def observe_step(self, num_tokens: int, seconds: float, *, is_uniform: bool) -> None:
        """Record a step that only decoded, without its draft. is_uniform: all sequences had as many tokens."""
        costs, kind = self._verify[is_uniform], (is_uniform, bucket(num_tokens))
        usual = costs.median(num_tokens)
        if usual:
            # A step unlike the one before takes longer than usual, and says less about the machine.
            weight = _PACE_WEIGHT if kind == self._last_kind else _PACE_WEIGHT / 10
            self.pace += weight * (min(seconds / usual, 2.0) - self.pace)
        if not usual or kind != self._last_kind:
            costs.observe(num_tokens, seconds / self.pace)
        self._last_kind = kind
        self._largest_step = max(self._largest_step, num_tokens)

    def observe_draft(self, num_sequences: int, num_draft_tokens: int, seconds: float) -> None:
        """Record a draft of `num_draft_tokens` tokens for each of `num_sequences` sequences."""
        self._draft.setdefault(num_draft_tokens, StepCosts()).observe(num_sequences, seconds / self.pace)

    def observe_catch_up(self, num_tokens: int, seconds: float) -> None:
        """Record the draft model's computation of tokens that it had missed."""
        per_token = seconds / self.pace / num_tokens
        self._catch_up_seconds = (self._catch_up_seconds + per_token) / 2 if self._catch_up_seconds else per_token

    def observe_acceptance(self, acceptance_rate: float, num_draft_tokens: int, num_accepted: int) -> float:
        """Return a sequence's acceptance rate after the verification of its draft tokens."""
        for index in range(
            min(num_draft_tokens, num_accepted + 1)
        ):  # those after the first rejected one were not compared
            is_accepted = index < num_accepted
            acceptance_rate += _ACCEPTANCE_WEIGHT * (is_accepted - acceptance_rate)
            self.acceptance_rate += _ACCEPTANCE_WEIGHT / 10 * (is_accepted - self.acceptance_rate)
        return acceptance_rate

    def is_resting(self, num_sequences: int) -> bool:
        """Return whether an earlier decision not to draft still holds for a step with `num_sequences` decodes."""
        return self._num_resting_steps > 0 and self._num_resting_sequences == num_sequences

    def choose(self, candidates: Sequence[Candidate], num_sequences: int) -> int:
        """Return the number of draft tokens per candidate. num_sequences: of the step, other sequences included."""
        if not self._verify[True]:
            return 0
        base = self._verify[True].estimate(num_sequences)
        self._credit += _PROBE_SHARE * base
        if self.is_resting(num_sequences):
            self._num_resting_steps -= 1
            return 0
        self._num_resting_steps = 0
        if not candidates:
            return 0
        max_drafts, acceptance_rates, missing, remaining = map(np.array, zip(*candidates, strict=True))
        num_draft_tokens = np.arange(max_drafts.max() + 1)
        is_drafted = (max_drafts[:, None] >= num_draft_tokens) & (num_draft_tokens > 0)
        expected = num_sequences + (acceptance_rates[:, None] ** num_draft_tokens * is_drafted).sum(0).cumsum()
        seconds = self._verify_seconds(num_sequences + is_drafted.sum(0).cumsum(), num_sequences)
        seconds += self._draft_seconds(len(candidates), len(num_draft_tokens))
        catch_up = self._catch_up_seconds * float(missing.sum())
        catch_up_per_step = catch_up / min(_HORIZON, max(1, remaining.max()))
        tokens_per_second = expected / (seconds + catch_up_per_step * (num_draft_tokens > 0))
        if self._num_draft_tokens == 0:
            tokens_per_second[0] *= _MIN_GAIN
        best = self._num_draft_tokens = int(tokens_per_second.argmax())
        lost = seconds - seconds[best] / expected[best] * expected
        if best == 0:
            lost[1:] += catch_up / _PROBE_STEPS
        probe, cost = self._next_probe(best, lost, base)
        if probe is not None:
            return probe
        if best == 0 and len(candidates) == num_sequences:
            self._num_resting_steps = int(min(_HORIZON, (cost - self._credit) / (_PROBE_SHARE * base)))
            self._num_resting_sequences = num_sequences
        return best

    def _next_probe(self, best: int, lost: Float[np.ndarray, "K"], base: float) -> tuple[int | None, float]:
        """Return a probe if one is under way or can be afforded, and the seconds that it is expected to lose.

        lost: by a step with 0, 1, … draft tokens, in comparison with `best`. base: seconds of a step without any.
        """
        can_probe = [count for count, seconds in enumerate(lost) if np.isfinite(seconds)]
        if self._num_probe_steps and self._probe in can_probe:
            self._num_probe_steps -= 1
            return self._probe, 0.0
        self._num_probe_steps = 0
        options = [count for count in (0, best - 1, best + 1) if count != best and count in can_probe]
        if not options:
            return None, np.inf
        self._num_probes += 1
        probe = options[self._num_probes % len(options)]
        cost = _PROBE_STEPS * max(float(lost[probe]), (_MIN_GAIN - 1) * base)
        if cost > self._credit:
            return None, cost
        self._credit = min(self._credit, 2 * cost) - cost  # at most one more such probe may follow at once
        self._probe, self._num_probe_steps = probe, _PROBE_STEPS - 1
        return probe, cost

    def _verify_seconds(self, num_tokens: Int[np.ndarray, "K"], num_sequences: int) -> Float[np.ndarray, "K"]:
        """Return the seconds of steps with 0, 1, … draft tokens per sequence; infinite where they are too large."""
        uniform = self._verify[True].estimate_each(num_tokens)
        ragged = self._verify[False].estimate_each(num_tokens) if self._verify[False] else uniform
        is_uniform = num_tokens == num_sequences * np.arange(1, len(num_tokens) + 1)
        seconds = np.where(is_uniform, uniform, ragged)
        # A larger step is not faster, and one that is far larger than any measured one may take ten times as long.
        return np.where(num_tokens <= 2 * self._largest_step, np.maximum(seconds, uniform[0]), np.inf)

    def _draft_seconds(self, num_sequences: int, num_options: int) -> Float[np.ndarray, "K"]:
        """Return the seconds of 0, 1, … draft tokens, in proportion to the nearest measured number of them."""
        measured = {count: costs.estimate(num_sequences) / count for count, costs in self._draft.items() if costs}
        if not measured:
            return np.zeros(num_options)
        known = np.array(list(measured))
        counts = np.arange(num_options)
        nearest = known[np.abs(known - counts[:, None]).argmin(1)]
        return counts * [measured[count] for count in nearest.tolist()]
