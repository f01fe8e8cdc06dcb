"""The draft controller on a machine whose step costs and acceptance rates are known, with a virtual clock."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from dispec.bench.speculative_run import predicted_speedup
from dispec.engine.speculation.controller import Candidate, DraftController
from dispec.engine.speculation.step_costs import StepCosts, bucket

pytestmark = pytest.mark.smoke

MAX_DRAFTS = 5


@dataclass
class Machine:
    """Sequences that decode with draft tokens. Seconds are virtual.

    verify: seconds of a step by its tokens; draft: seconds of each draft token; catch_up: of each missed token.
    available: whether a sequence can have draft tokens in a step. slow: a factor of all seconds, by the step's index.
    """

    verify: Callable[[int], float]
    draft: float = 0.0
    catch_up: float = 0.0
    num_sequences: int = 1
    available: float = 1.0
    slow: Callable[[int], float] = lambda _: 1.0
    cold: float = 1.0  # factor of the first step after one without draft tokens
    seconds: float = 0.0
    num_tokens: int = 0
    counts: list[int] = field(default_factory=list)

    def run(self, controller: DraftController, acceptance: Callable[[int], float], num_steps: int) -> float:
        """Run steps, with the acceptance rate by the step's index, and return tokens per second of these."""
        rng = random.Random(0)
        rates = [controller.acceptance_rate] * self.num_sequences
        missing = [0] * self.num_sequences
        seconds, num_tokens = self.seconds, self.num_tokens
        for index in range(num_steps):
            drafting = [number for number in range(self.num_sequences) if rng.random() < self.available]
            candidates = [Candidate(MAX_DRAFTS, rates[number], missing[number], 1000) for number in drafting]
            count = controller.choose(candidates, self.num_sequences)
            drafting = drafting if count else []
            factor = self.slow(index) * (self.cold if drafting and not (self.counts and self.counts[-1]) else 1.0)
            self.counts.append(count if drafting else 0)
            if drafting and self.draft:
                if num_missing := sum(missing[number] for number in drafting):
                    controller.observe_catch_up(num_missing, self._spend(self.catch_up * num_missing * factor))
                controller.observe_draft(len(drafting), count, self._spend(self.draft * count * factor))
            size = self.num_sequences + count * len(drafting)
            is_uniform = len(drafting) in (0, self.num_sequences)
            controller.observe_step(size, self._spend(self.verify(size) * factor), is_uniform=is_uniform)
            for number in range(self.num_sequences):
                self.num_tokens += 1
                missing[number] = min(missing[number] + 1, 150)  # sequences end, and others take their place
                if number in drafting:
                    missing[number] = num_accepted = 0
                    while num_accepted < count and rng.random() < acceptance(index):
                        num_accepted += 1
                    self.num_tokens += num_accepted
                    rates[number] = controller.observe_acceptance(rates[number], count, num_accepted)
        return (self.num_tokens - num_tokens) / (self.seconds - seconds)

    def _spend(self, seconds: float) -> float:
        self.seconds += seconds
        return seconds

    @property
    def plain(self) -> float:
        """Tokens per second without draft tokens."""
        return self.num_sequences / self.verify(self.num_sequences)

    def best_speedup(self, acceptance: float) -> float:
        """The speed-up of the best fixed number of draft tokens."""
        n = self.num_sequences
        return max(
            predicted_speedup(acceptance, k, self.verify(n), self.verify(n * (1 + k)), self.draft * k)
            for k in range(MAX_DRAFTS + 1)
        )


@pytest.mark.parametrize("num_sequences", [1, 4])
@pytest.mark.parametrize("acceptance", [0.05, 0.5, 0.9])
@pytest.mark.parametrize(("per_token", "draft"), [(0.1, 0.5), (0.5, 0.2), (1.0, 2.0)])
def test_tokens_per_second_are_near_those_of_the_best_fixed_number(num_sequences, acceptance, per_token, draft):
    machine = Machine(lambda size: 10.0 + per_token * (size - num_sequences), draft, 0.01, num_sequences)
    speedup = machine.run(DraftController(), lambda _: acceptance, 1000) / machine.plain
    assert speedup > 0.95 * machine.best_speedup(acceptance)


@pytest.mark.parametrize("num_sequences", [1, 16])
@pytest.mark.parametrize(("acceptance", "draft", "available"), [(0.02, 0.1, 1.0), (0.5, 9.0, 1.0), (0.1, 0.0, 0.4)])
def test_where_no_draft_pays_less_than_two_percent_of_the_time_is_lost(num_sequences, acceptance, draft, available):
    machine = Machine(lambda size: 10.0 + 0.8 * (size - num_sequences), draft, 0.02, num_sequences, available)
    controller = DraftController()
    machine.run(controller, lambda _: acceptance, 300)  # what costs are unknown is tried at first
    assert machine.run(controller, lambda _: acceptance, 2000) > 0.98 * machine.plain
    assert any(machine.counts[300:]), "probes notice if that changes"


@pytest.mark.parametrize("num_sequences", [1, 4])
def test_a_change_of_the_acceptance_rate_is_noticed(num_sequences):
    machine = Machine(lambda size: 10.0 + 0.2 * (size - num_sequences), 0.3, 0.01, num_sequences)
    controller = DraftController()
    machine.run(controller, lambda step: 0.9 if step >= 600 else 0.02, 1800)
    assert np.mean(machine.counts[300:600]) < 0.3
    assert np.mean(machine.counts[-600:]) > 3
    machine.run(controller, lambda _: 0.02, 1000)
    assert np.mean(machine.counts[-600:]) < 0.3


@pytest.mark.parametrize("num_slow", [2, 40])
def test_costs_measured_while_other_work_delayed_drafts_are_corrected(num_slow):
    machine, controller = Machine(lambda size: 10.0 + 0.1 * (size - 1), 1.0), DraftController()
    machine.draft = 40.0
    machine.run(controller, lambda _: 0.8, num_slow)
    machine.draft = 1.0
    machine.run(controller, lambda _: 0.8, 6000)
    assert np.mean(np.array(machine.counts[-100:]) > 0) > 0.9


def test_drafts_that_become_expensive_end_and_cheap_ones_start_again():
    controller, machine = DraftController(), Machine(lambda size: 10.0 + 0.2 * (size - 1), 0.2)
    for draft, pays in ((0.2, True), (8.0, False), (0.2, True)):
        machine.draft = draft
        machine.run(controller, lambda _: 0.4, 3000)
        assert (np.mean(np.array(machine.counts[-500:]) > 0) > 0.9) == pays
        assert (np.mean(np.array(machine.counts[-500:]) > 0) < 0.1) == (not pays)


def test_a_machine_that_slows_down_and_recovers_changes_no_decision():
    machine, controller = Machine(lambda size: 10.0 + 1.5 * (size - 1), 1.0), DraftController()
    machine.slow = lambda step: 1.6 if step // 150 % 2 else 1.0
    machine.run(controller, lambda _: 0.7, 3000)
    assert np.mean(np.array(machine.counts[300:]) > 0) > 0.95
    machine.slow = lambda _: 1.0
    assert machine.run(controller, lambda _: 0.7, 1000) / machine.plain > 0.95 * machine.best_speedup(0.7)


def test_a_first_step_with_drafts_that_is_slow_does_not_end_drafts():
    """Caches hold what the steps before read: a single step with drafts takes longer than one of many."""
    machine = Machine(lambda size: 10.0 + 0.1 * (size - 1), 1.0, cold=1.8)
    machine.run(DraftController(), lambda _: 0.5, 300)
    assert np.mean(np.array(machine.counts[50:]) > 0) > 0.9


@pytest.mark.parametrize("num_sequences", [1, 4])
def test_where_no_draft_pays_most_steps_need_no_plan(num_sequences):
    machine = Machine(lambda size: 10.0 + 9.0 * (size - num_sequences), 1.0, 0.0, num_sequences)
    controller, num_resting = DraftController(), 0
    machine.run(controller, lambda _: 0.02, 500)
    for _ in range(500):
        num_resting += controller.is_resting(num_sequences)
        machine.run(controller, lambda _: 0.02, 1)
    assert num_resting > 450
    while not controller.is_resting(num_sequences):
        machine.run(controller, lambda _: 0.02, 1)
    assert not controller.is_resting(num_sequences + 1), "another batch may be worth draft tokens"


def test_steps_in_which_some_sequences_cannot_have_drafts_are_always_planned():
    machine = Machine(lambda size: 10.0 + 9.0 * (size - 4), num_sequences=4, available=0.0)
    controller = DraftController()
    for _ in range(100):
        machine.run(controller, lambda _: 0.02, 1)
        assert not controller.is_resting(4)


def test_drafts_that_are_rarely_available_are_used_when_they_are():
    machine = Machine(lambda size: 10.0 + 0.1 * (size - 1), available=0.3)
    controller = DraftController()
    machine.run(controller, lambda _: 0.9, 600)
    assert np.mean(np.array(machine.counts[100:]) > 0) > 0.2


def test_the_first_plan_without_any_measured_step_has_no_drafts():
    assert DraftController().choose([Candidate(5, 0.9)], 1) == 0


def test_a_step_has_at_most_twice_the_tokens_of_the_largest_measured_one():
    controller, sizes = DraftController(), []
    for _ in range(8):
        controller.observe_step(4, 10.0, is_uniform=True)
    for _ in range(3):
        sizes.append(4 + 4 * controller.choose([Candidate(9, 0.9)] * 4, 4))
        for _ in range(8):
            controller.observe_step(sizes[-1], 10.0, is_uniform=True)
    assert sizes == [8, 16, 32]


def taught(catch_up: float = 0.0) -> DraftController:
    """A controller that knows the costs of steps of up to 6 tokens."""
    controller = DraftController()
    for _ in range(10):
        for size in range(1, 7):
            controller.observe_step(size, 10.0 + 0.1 * size, is_uniform=True)
            controller.observe_draft(1, size, 1.0 * size)
    if catch_up:
        controller.observe_catch_up(200, catch_up)
    return controller


def test_catching_up_must_pay_off_before_the_sequence_ends():
    assert taught(20.0).choose([Candidate(5, 0.6)], 1) > 0
    assert taught(20.0).choose([Candidate(5, 0.6, num_missing_tokens=200, num_remaining_tokens=100)], 1) > 0
    assert taught(20.0).choose([Candidate(5, 0.6, num_missing_tokens=200, num_remaining_tokens=2)], 1) == 0
    assert taught(20.0).choose([Candidate(5, 0.6, num_missing_tokens=20_000, num_remaining_tokens=1000)], 1) == 0


def test_drafts_continue_where_they_would_not_start():
    """A start costs more than a step."""
    weak, strong = [Candidate(1, 0.12)], [Candidate(1, 0.9)]
    assert taught().choose(weak, 1) == 0
    controller = taught()
    assert controller.choose(strong, 1) == 1
    assert controller.choose(weak, 1) == 1


def test_a_new_sequence_starts_with_the_acceptance_rate_of_those_before_it():
    controller = DraftController()
    assert controller.acceptance_rate > 0.5
    rate = controller.acceptance_rate
    for step in range(2000):
        rate = controller.observe_acceptance(rate, 1, int(step % 4 == 0))
    assert controller.acceptance_rate == pytest.approx(0.25, abs=0.05)
    for _ in range(10):  # a few rejected draft tokens in a row say little about a sequence
        rate = controller.observe_acceptance(0.4, 1, 0)
    assert rate > 0.2


def test_draft_tokens_after_the_first_rejected_one_are_not_counted():
    controller = DraftController()
    assert controller.observe_acceptance(0.5, 5, 0) == controller.observe_acceptance(0.5, 1, 0)
    assert controller.observe_acceptance(0.5, 5, 5) > controller.observe_acceptance(0.5, 5, 4) > 0.5


def test_costs_are_medians_interpolated_between_sizes():
    costs = StepCosts()
    assert not costs
    for seconds in (90.0, 10.0, 10.0, 11.0):
        assert costs.median(4) is None
        costs.observe(4, seconds)
    assert costs.median(4) == 10.0
    for seconds in (20.0, 90.0, 20.0, 21.0):
        costs.observe(8, seconds)
    assert costs.estimate_each(np.array([4, 6, 8, 100])).tolist() == [10.0, 15.0, 20.0, 20.0]
    for _ in range(8):
        costs.observe(4, 12.0)
    assert costs.median(4) == 12.0


def test_sizes_are_exact_up_to_16_and_within_an_eighth_above():
    assert [bucket(size) for size in range(1, 17)] == list(range(1, 17))
    assert all(size <= bucket(size) <= size * 9 / 8 + 1 for size in range(17, 3000))
