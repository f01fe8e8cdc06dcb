"""The controller against what the formula says is best, and against its own costs."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispec.engine.speculation.acceptance import Acceptance
from dispec.engine.speculation.controller import DraftController, predicted_speedup
from dispec.engine.speculation.planned_step import Behind, PlannedStep
from dispec.engine.speculation.step_costs import Cost, StepCosts


def taught(decode: float, per_token: float, draft: float, sequences: int = 1) -> DraftController:
    """A controller that has seen steps of every size."""
    controller = DraftController()
    for extra in 10 * list(range(40)):
        for costs in (controller.uniform, controller.ragged):
            costs.observe(sequences + extra, decode + per_token * extra)
    controller.draft.observe(sequences, draft)
    controller.further_draft.observe(sequences, draft)
    return controller


def known(chance: float) -> Acceptance:
    return Acceptance(right=[chance * 1e6] * 2, tried=[1e6] * 2)


@pytest.mark.parametrize("chance", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize(("per_token", "draft"), [(0.0, 0.0), (0.1, 0.2), (0.5, 0.1), (1.0, 1.0)])
def test_one_sequence_gets_the_number_that_the_formula_says_is_best(chance, per_token, draft) -> None:
    controller = taught(10.0, per_token, draft)
    chosen = controller.choose({1: 5}, {1: known(chance)}, 1).get(1, 0)
    speed_ups = [predicted_speedup(chance, count, 10.0, 10.0 + per_token * count, draft * count) for count in range(6)]
    assert speed_ups[chosen] == pytest.approx(max(speed_ups), rel=0.011)


@pytest.mark.parametrize("chance", [0.3, 0.5, 0.7, 0.9])
def test_what_only_the_first_of_several_guesses_takes_is_not_counted_again(chance) -> None:
    controller = taught(10.0, 0.1, 0.0)
    controller.draft, controller.further_draft = StepCosts(), StepCosts()  # nothing is known of these
    for runs in 20 * [1, 2, 4]:
        controller.observe_draft(1, runs, 2.5 + 0.2 * runs)
    chosen = controller.choose({1: 5}, {1: known(chance)}, 1).get(1, 0)
    speed_ups = [
        predicted_speedup(chance, count, 10.0, 10.0 + 0.1 * count, 2.5 * (count > 0) + 0.2 * count)
        for count in range(6)
    ]
    assert speed_ups[chosen] == pytest.approx(max(speed_ups), rel=0.011)


def test_that_several_guesses_once_seemed_to_take_no_longer_than_one_is_not_believed_for_ever() -> None:
    controller = DraftController()
    for runs, seconds in [(1, 1.0)] + 3 * [(3, 0.9)] + 100 * [(3, 2.0)]:
        controller.observe_draft(1, runs, seconds)
    assert controller.further_draft.of(1) == pytest.approx(0.5, rel=0.05)


def test_that_another_guess_costs_little_is_found_out_though_it_once_cost_much() -> None:
    controller, chances, counts = taught(10.0, 0.1, 0.3), known(0.6), []
    for _ in range(30):
        for size in range(3, 7):
            controller.uniform.observe(size, 18.0)  # something held them up
    for _ in range(4000):
        chosen = controller.choose({1: 5}, {1: chances}, 1)
        counts.append(chosen.get(1, 0))
        size = 1 + counts[-1]
        controller.observe_draft(1, counts[-1], 0.3 * counts[-1])
        controller.observe_step(size, 10.0 + 0.1 * counts[-1], is_uniform=True)
    assert sum(count <= 1 for count in counts[:50]) > 45
    assert sum(count >= 2 for count in counts[-1000:]) > 900


@pytest.mark.parametrize("sequences", [1, 4])
def test_another_guess_that_is_not_worth_it_is_tried_for_half_a_hundredth_of_the_time(sequences) -> None:
    controller = taught(10.0, 0.0, 0.1, sequences)
    for extra in range(2 * sequences, 40):
        for _ in range(200):
            controller.uniform.observe(extra + 1, 14.0)
            controller.ragged.observe(extra + 1, 14.0)
    acceptance = {key: known(0.5) for key in range(sequences)}
    counts: Counter[int] = Counter()
    for _ in range(4000):
        chosen = controller.choose(dict.fromkeys(acceptance, 5), acceptance, sequences)
        counts[max(chosen.values(), default=0)] += 1
    rates = {count: (1 + 0.5 * (count > 0) + 0.25 * (count > 1)) / (10.0, 10.1, 14.2)[count] for count in range(3)}
    assert counts[1] > 3700
    assert counts[2] > 10
    lost = counts[2] * 14.2 * (1 - rates[2] / rates[1])
    assert lost < 0.0055 * 4000 * 10.0


def test_guesses_go_to_those_whose_guesses_stand() -> None:
    controller = taught(10.0, 2.0, 0.0, sequences=2)
    chosen = controller.choose({1: 5, 2: 5}, {1: known(0.95), 2: known(0.05)}, 2)
    assert chosen.get(1, 0) > 0
    assert chosen.get(2, 0) == 0


@pytest.mark.parametrize("sequences", [1, 4, 16])
def test_where_nothing_pays_probes_take_half_a_hundredth_of_the_time(sequences) -> None:
    """What a draft model must make up for first included, which is the more the longer it rested."""
    controller = taught(10.0, 0.1, 1.0, sequences)
    for _ in range(60):
        controller.observe_catch_up(100, 2.0)
        controller.observe_catch_up(1, 0.5)
    acceptance = {key: known(0.02) for key in range(sequences)}
    missed, spent, probes, steps = 100, 0.0, 0, 4000
    for _ in range(steps):
        behind = {key: Behind(missed, 1000) for key in acceptance}
        rests = controller.rests(sequences)
        chosen = {} if rests else controller.choose(dict.fromkeys(acceptance, 5), acceptance, sequences, behind)
        missed += 1
        if chosen:
            probes += 1
            spent += 0.1 * sum(chosen.values()) + max(chosen.values()) + (0.5 + 0.015 * missed) * len(chosen)
            missed = 0
            for key, count in chosen.items():
                acceptance[key].observe(count, 0)
    assert probes > 2
    assert spent < 0.0055 * 10.0 * steps


def test_where_nothing_pays_most_steps_of_several_sequences_are_not_thought_about() -> None:
    controller, acceptance = taught(10.0, 9.0, 1.0, sequences=4), {key: known(0.02) for key in range(4)}
    thought = 0
    for _ in range(320):
        if not controller.rests(4):
            thought += 1
            assert not controller.choose(dict.fromkeys(acceptance, 5), acceptance, 4)
    assert thought == 10
    assert controller.rests(4)
    assert not controller.rests(3)  # another batch may be worth guesses
    assert controller.choose({1: 5}, {1: known(0.9)}, 4) == {}
    assert not controller.rests(4)  # only one of the four could have had any: it may be all of them next time


@pytest.mark.parametrize(("held_up", "steps"), [(1, 400), (3, 400), (10, 30_000)])
def test_what_guesses_cost_while_something_held_them_up_is_not_believed_for_ever(held_up, steps) -> None:
    """As the first, for which there may be something to compile: not even right ones would pay at that cost."""
    controller, acceptance, guessed = DraftController(), {1: known(0.8)}, []
    for _ in range(steps):
        chosen = {} if controller.rests(1) else controller.choose({1: 5}, acceptance, 1)
        guessed.append(bool(chosen))
        if chosen:
            controller.observe_draft(1, chosen[1], chosen[1] * (40.0 if sum(guessed) <= held_up else 1.0))
        controller.observe_step(1 + sum(chosen.values()), 10.0, is_uniform=True)
    assert sum(guessed[-100:]) > 95


def test_what_was_not_probed_for_long_is_not_made_up_for() -> None:
    controller, acceptance = taught(10.0, 1.0, 1.0), {1: known(0.05)}
    for _ in range(100):
        controller.observe_step(1, 10.0, is_uniform=True)
        controller.choose({}, acceptance, 1)
        controller.budget.credit += 10.0  # as if there had been no time to guess anything
    probes = sum(bool(controller.choose({1: 5}, acceptance, 1)) for _ in range(50))
    assert 2 <= probes <= 5


def test_hardly_any_is_tried_where_not_even_right_guesses_would_pay() -> None:
    controller = taught(10.0, 9.0, 1.0)
    tried = sum(bool(controller.choose({1: 5}, {1: known(0.3)}, 1)) for _ in range(10_000))
    assert 0 < tried * (9.0 + 1.0) < 0.0006 * 10_000 * 10.0


def test_nothing_is_guessed_before_a_step_was_seen() -> None:
    assert DraftController().choose({1: 5}, {1: known(0.9)}, 1) == {}


def test_a_sequence_whose_guesses_begin_to_stand_is_noticed() -> None:
    acceptance = known(0.0)
    acceptance.right, acceptance.tried = [0.0, 0.0], [10.0, 10.0]
    for _ in range(60):
        acceptance.observe(3, 3)
    assert acceptance.chances(3)[-1] > 0.8
    for _ in range(60):
        acceptance.observe(3, 1)
    first, both = acceptance.chances(2)
    assert first > 0.9
    assert both < 0.2


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.integers(1, 16), st.floats(1.0, 50.0), min_size=1),
    st.dictionaries(st.integers(1, 16), st.floats(1.0, 50.0)),
    st.floats(0.0, 5.0),
    st.lists(st.tuples(st.integers(1, 4), st.floats(0.0, 1.0)), min_size=1, max_size=6),
    st.integers(0, 2),
)
def test_what_is_looked_at_first_hides_nothing(uniform, ragged, draft, sequences, others) -> None:
    """Whether any number of guesses can pay is asked before which: the answer must not be no where one does."""
    controller = DraftController()
    for tokens, seconds in 10 * list(uniform.items()):
        controller.uniform.observe(tokens, seconds)
    for tokens, seconds in 10 * list(ragged.items()):
        controller.ragged.observe(tokens, seconds)
    controller.draft.observe(len(sequences), draft)
    controller.further_draft.observe(len(sequences), draft)
    controller.budget.credit, controller.budget.explored = -1e9, Counter(dict.fromkeys(range(99), 99))  # and no probes
    num_sequences = len(sequences) + others
    available = {key: most for key, (most, _) in enumerate(sequences)}
    acceptance = {key: known(chance) for key, (_, chance) in enumerate(sequences)}
    chances = {key: acceptance[key].chances(most) for key, most in available.items()}
    base = controller.uniform.of(num_sequences)
    assert base is not None
    _, exhaustive = controller._best(PlannedStep(chances, num_sequences, base, draft, draft, {}, goes_on=False))
    assert controller.choose(available, acceptance, num_sequences) == exhaustive


def test_a_draft_model_that_is_far_behind_must_be_worth_making_up_for() -> None:
    controller = taught(10.0, 0.1, 1.0)
    for _ in range(60):
        controller.observe_catch_up(200, 20.0)
    assert controller.choose({1: 5}, {1: known(0.6)}, 1)
    for remaining, pays in ((100, True), (2, False)):
        fresh = taught(10.0, 0.1, 1.0)
        fresh.catch_up = controller.catch_up
        assert bool(fresh.choose({1: 5}, {1: known(0.6)}, 1, {1: Behind(200, remaining)})) == pays


def test_what_is_missed_is_spread_over_as_many_steps_as_guesses_usually_go_on() -> None:
    controller = taught(10.0, 0.1, 1.0)
    for _ in range(60):
        controller.observe_catch_up(200, 20.0)
    far = {1: Behind(200, 1000)}
    assert controller.choose({1: 5}, {1: known(0.6)}, 1, far)
    for _ in range(40):  # begun, and given up after a step
        controller.choose({1: 5}, {1: known(0.9)}, 1)
        controller._count_run({})
        controller._count_run({})
    assert controller.run_length < 3
    assert not controller.choose({1: 5}, {1: known(0.6)}, 1, far)
    assert controller.choose({1: 5}, {1: known(0.6)}, 1)


def test_guesses_go_on_where_they_would_not_begin() -> None:
    """Or they would be begun and given up over and over, which costs most."""
    chance, cost = known(0.35), taught(10.0, 0.75, 1.5, sequences=2)  # a gain of 1.04
    available = {1: 1, 2: 1}
    assert not cost.choose(available, {1: chance, 2: chance}, 2)
    again = taught(10.0, 0.75, 1.5, sequences=2)
    assert again.choose(available, {1: known(0.9), 2: known(0.9)}, 2)
    assert again.choose(available, {1: chance, 2: chance}, 2)


def test_first_guesses_are_at_most_as_many_as_were_verified_before() -> None:
    """Nothing is known of what larger steps cost, and they may cost ten times as much."""
    controller, sizes = DraftController(), []
    for _ in range(8):
        controller.observe_step(4, 10.0, is_uniform=True)
    for _ in range(3):
        chosen = controller.choose(dict.fromkeys(range(4), 9), {key: known(0.9) for key in range(4)}, 4)
        sizes.append(4 + sum(chosen.values()))
        controller.observe_step(sizes[-1], 10.0, is_uniform=True)
    assert sizes == [8, 16, 32]


def test_what_guesses_cost_is_learned_in_steps_one_after_the_other() -> None:
    """A single one among others is slow, and where that were all that is known none would ever be made again."""
    controller, acceptance = DraftController(), {key: known(0.5) for key in range(2)}
    alone, together, taken = 18.5, 11.0, []
    for _ in range(60):
        chosen = controller.choose(dict.fromkeys(acceptance, 1), acceptance, 2)
        seconds = 10.0 if not chosen else together if taken and taken[-1] else alone
        controller.observe_step(2 + sum(chosen.values()), seconds, is_uniform=True)
        taken.append(bool(chosen))
    assert sum(taken) > 50


@pytest.mark.parametrize(("missed", "tried"), [(100, True), (10_000, False)])
def test_nobody_waits_long_for_the_first_guesses(missed, tried) -> None:
    """Of many sequences with long contexts a draft model may have missed what takes it seconds."""
    controller, acceptance = DraftController(), {key: known(0.1) for key in range(4)}
    controller.observe_catch_up(100, 5.0)
    controller.observe_step(4, 10.0, is_uniform=True)
    behind = {key: Behind(missed, 100) for key in acceptance}
    assert bool(controller.choose(dict.fromkeys(acceptance, 5), acceptance, 4, behind)) == tried


def test_what_is_never_learned_is_not_tried_for_ever() -> None:
    """As where there is no memory for guesses."""
    controller, acceptance = DraftController(), {1: known(0.1)}
    controller.observe_step(1, 10.0, is_uniform=True)
    controller.observe_step(2, 30.0, is_uniform=True)
    asked = sum(bool(controller.choose({1: 1}, acceptance, 1)) for _ in range(500))
    assert asked <= 12


def test_what_was_slow_once_is_tried_again() -> None:
    cost = Cost(10.0)
    assert cost.hoped == pytest.approx(8.0)
    cost.observe(10.0)
    cost.observe(10.0)
    assert cost.hoped == pytest.approx(10.0)


def test_a_step_of_more_tokens_is_never_thought_to_be_the_faster_one() -> None:
    controller = DraftController()
    for _ in range(10):
        controller.uniform.observe(1, 10.0)
        controller.uniform.observe(2, 8.0)
    controller.draft.observe(1, 1.0)
    assert not controller.choose({1: 1}, {1: known(0.1)}, 1)


def differing(uniform: float, ragged: float) -> DraftController:
    """Four sequences in 10 ms, a guess of each in 1; what verifying a guess costs if all have as many, and if not."""
    controller = DraftController()
    for tokens in 10 * list(range(4, 24)):
        controller.uniform.observe(tokens, 10.0 + uniform * (tokens - 4))
        controller.ragged.observe(tokens, 10.0 + ragged * (tokens - 4))
    controller.draft.observe(4, 1.0)
    return controller


def test_all_have_as_many_guesses_where_others_would_cost_more() -> None:
    chances = {1: known(0.95), 2: known(0.6), 3: known(0.4), 4: known(0.1)}
    available = dict.fromkeys(chances, 5)
    dear = differing(0.3, 3.0).choose(available, chances, 4)
    assert len(dear) == 4
    assert len(set(dear.values())) == 1
    cheap = differing(0.3, 0.3).choose(available, chances, 4)
    assert cheap[1] > cheap[3] > cheap.get(4, 0)


def test_without_guesses_of_some_the_others_pay_as_steps_that_differ() -> None:
    chances = {1: known(0.8), 2: known(0.6), 3: known(0.4)}
    available = dict.fromkeys(chances, 5)
    assert not differing(0.3, 20.0).choose(available, chances, 4)
    assert differing(20.0, 0.3).choose(available, chances, 4)


def test_all_are_tried_at_once_where_they_can_be() -> None:
    controller = differing(1.0, 1.0)
    chances = {key: known(0.02) for key in range(4)}
    tried = [controller.choose(dict.fromkeys(chances, 5), chances, 4) for _ in range(300)]
    assert [one for one in tried if one] == [dict.fromkeys(chances, 1)] * sum(map(bool, tried))
    assert any(tried)


def test_what_a_step_takes_without_guesses_is_not_forgotten() -> None:
    """It may have been learned while something else held the machine up."""
    controller = taught(20.0, 0.5, 1.0)
    acceptance = known(0.2)
    assert controller.choose({1: 5}, {1: acceptance}, 1)
    guessed = []
    for step in range(800):
        count = controller.choose({1: 5}, {1: acceptance}, 1).get(1, 0)
        if count:
            acceptance.observe(count, int(step % 5 == 0))
        else:
            controller.uniform.observe(1, 10.0)
        guessed.append(count > 0)
    assert all(guessed[:30])
    assert sum(guessed[-400:]) < 20  # but for probes


def test_a_time_that_something_else_held_up_says_little() -> None:
    cost = Cost(40.0)
    for seconds in (10.0, 11.0, 10.0, 90.0, 10.0, 10.0, 90.0, 10.0, 10.0, 10.0):
        cost.observe(seconds)
    assert cost.seconds == pytest.approx(10.0, rel=0.06)
    for _ in range(100):
        cost.observe(20.0)
    assert cost.seconds == pytest.approx(20.0, rel=0.02)


def test_guesses_that_come_up_seldom_are_made_when_they_do() -> None:
    """As n-grams are found: a step in which there were none says nothing about the next one."""
    controller = taught(10.0, 0.1, 0.0)
    acceptance = {1: known(0.9)}
    for step in range(60):
        available = {1: 5} if step % 3 == 0 else {}
        assert bool(controller.choose(available, acceptance, 1)) == bool(available)


def test_costs_that_were_learned_while_the_machine_was_slower_are_no_higher() -> None:
    """First a step without guesses, then ones with, while everything takes half as long again."""
    controller = DraftController()
    for _ in range(40):
        controller.observe_step(1, 10.0, is_uniform=True)
        controller.observe_step(2, 11.0, is_uniform=True)
    for _ in range(100):
        controller.observe_step(2, 16.5, is_uniform=True)
        controller.observe_draft(1, 1, 1.5)
    decode, verify, draft = controller.uniform.of(1), controller.uniform.of(2), controller.draft.of(1)
    assert decode is not None
    assert verify == pytest.approx(1.1 * decode, rel=0.08)
    assert draft == pytest.approx(0.1 * decode, rel=0.08)


def test_a_new_sequence_is_thought_to_be_like_those_before_it() -> None:
    others = Acceptance(forgetting=0.998)
    for step in range(400):
        others.observe(2, (0, 0, 0, 1)[step % 4])
    assert Acceptance().chances(1)[0] > 0.5
    new = others.of_another()
    assert new.chances(2) == pytest.approx([0.25, 0.0], abs=0.02)
    for _ in range(20):
        new.observe(2, 2)
    assert new.chances(1)[0] > 0.55


def test_a_few_wrong_guesses_in_a_row_do_not_end_those_of_a_sequence() -> None:
    """What is known of others stays: without guesses nothing could show that they were chance."""
    others = Acceptance(forgetting=0.998)
    for step in range(1000):
        others.observe(1, (0, 1, 0, 1, 0, 1, 0, 1, 0, 0)[step % 10])
    new = others.of_another()
    for _ in range(10):
        new.observe(1, 0)
    assert 0.25 < new.chances(1)[0] < 0.35
    assert taught(10.0, 0.2, 1.0).choose({1: 5}, {1: new}, 1)


def test_what_is_slow_the_first_time_says_nothing_about_the_machine() -> None:
    controller = DraftController()
    for _ in range(40):
        controller.observe_step(1, 10.0, is_uniform=True)
    for seconds in (60.0, 15.0, 14.0):
        controller.observe_step(5, seconds, is_uniform=False)
    assert controller.pace == pytest.approx(1.0)
    assert controller.ragged.of(5) == pytest.approx(14.0)
