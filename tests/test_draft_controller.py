"""The controller against what the formula says is best, and against its own costs."""

import itertools

import pytest

from engine.draft_controller import Acceptance, DraftController, predicted_speedup


def taught(decode: float, per_token: float, draft: float, sequences: int = 1) -> DraftController:
    """A controller that has seen steps of every size."""
    controller = DraftController()
    for extra in range(40):
        controller.verify.observe(sequences + extra, decode + per_token * extra)
    controller.draft.observe(sequences, draft)
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


def test_guesses_go_to_those_whose_guesses_stand() -> None:
    controller = taught(10.0, 2.0, 0.0, sequences=2)
    chosen = controller.choose({1: 5, 2: 5}, {1: known(0.95), 2: known(0.05)}, 2)
    assert chosen.get(1, 0) > 0
    assert chosen.get(2, 0) == 0


def test_where_nothing_pays_there_are_only_probes_ever_fewer_of_them() -> None:
    controller, acceptance = taught(10.0, 2.0, 2.0), known(0.1)
    probes = []
    for step in range(2000):
        if count := controller.choose({1: 5}, {1: acceptance}, 1).get(1, 0):
            probes.append(step)
            acceptance.observe(count, 0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(probes)]
    assert 5 < len(probes) < 20
    assert gaps == sorted(gaps)


def test_nothing_is_tried_where_not_even_right_guesses_would_pay() -> None:
    controller = taught(10.0, 9.0, 1.0)
    assert not any(controller.choose({1: 5}, {1: known(0.3)}, 1) for _ in range(2000))


def test_many_sequences_together_try_no_more_than_one() -> None:
    controller = taught(10.0, 0.1, 8.0, sequences=16)
    acceptance = {key: known(0.02) for key in range(16)}
    tried = sum(len(controller.choose(dict.fromkeys(range(16), 5), acceptance, 16)) for _ in range(500))
    assert tried <= 500 / 16 * 1.5


def test_nothing_is_guessed_before_a_step_was_seen() -> None:
    assert DraftController().choose({1: 5}, {1: known(0.9)}, 1) == {}


def test_a_sequence_whose_guesses_begin_to_stand_is_noticed() -> None:
    acceptance = known(0.0)
    acceptance.right, acceptance.tried = [0.0, 0.0], [10.0, 10.0]
    for _ in range(60):
        acceptance.observe(3, 3)
    assert acceptance.all_right(3) > 0.9
    for _ in range(60):
        acceptance.observe(3, 1)
    assert acceptance.all_right(1) > 0.9
    assert acceptance.all_right(2) < 0.1
