"""The policy on random and on constructed load: within its bounds, without flapping, and neither deaf nor asleep."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispec.serving.cluster.autoscaling import Observation, Scaling, ScalingLimits, scale

LIMITS = ScalingLimits(least=1, most=6)
observations = st.builds(
    Observation,
    queued=st.integers(0, 200),
    running=st.integers(0, 200),
    capacity=st.integers(1, 64),
    kv_usage=st.floats(0, 1),
    attainment=st.floats(0, 1),
)


def run(load, first: int = 1) -> list[int]:
    """Desired workers second by second. load: what is seen, given the time and the workers."""
    state, history = Scaling(first), []
    for second in range(400):
        state = scale(state, load(second, state.desired), LIMITS, float(second))
        history.append(state.desired)
    return history


@settings(max_examples=200, deadline=None)
@given(st.lists(observations, min_size=1, max_size=60), st.integers(1, 3), st.integers(0, 5))
def test_it_stays_within_its_bounds_and_rests_between_changes(seen, least, more):
    limits = ScalingLimits(least=least, most=least + more)
    state, changes = Scaling(1), []
    for now, one in enumerate(seen):
        after = scale(state, one, limits, float(now))
        assert limits.least <= after.desired <= limits.most
        if after.desired != state.desired and state.changed > float("-inf"):
            changes.append(float(now) - state.changed)
        state = after
    assert all(pause >= limits.cool_down for pause in changes)


@pytest.mark.parametrize("requests", [0, 3, 8, 15, 31, 64, 1000])
def test_a_constant_load_is_answered_once_and_for_all(requests):
    def load(now, workers):
        running = min(requests, workers * 16)
        return Observation(requests - running, running, 16, running / (workers * 16) * 0.5)

    for first in (1, 6):
        history = run(load, first)
        turns = [after - before for before, after in itertools.pairwise(history) if after != before]
        assert all(turn > 0 for turn in turns) or all(turn < 0 for turn in turns), "it went up and down"
        needed = min(6, max(1, -(-requests // 16)))
        assert history[-1] >= needed
        assert history[-1] <= 2 * needed, "more than twice what is needed stays for ever"


def test_a_queue_that_lasts_makes_it_grow_and_a_moment_does_not():
    assert run(lambda now, workers: Observation(40, 16 * workers, 16, 0.5))[-1] == 6
    blip = run(lambda now, workers: Observation(40 if now == 5 else 0, 4, 16, 0.1))
    assert max(blip) == 1


def test_full_memory_makes_it_grow_without_a_queue():
    assert run(lambda now, workers: Observation(0, 2, 16, 0.97 if workers < 3 else 0.6))[-1] == 3


def test_missed_objectives_make_it_grow_only_where_there_is_work():
    assert run(lambda now, workers: Observation(0, 10 * workers, 16, 0.3, attainment=0.5))[-1] == 6
    assert run(lambda now, workers: Observation(0, 0, 16, 0.0, attainment=0.0))[-1] == 1


def test_when_the_load_has_gone_it_shrinks_one_by_one():
    history = run(lambda now, workers: Observation(0, 0, 16, 0.0), 6)
    assert history[-1] == 1
    assert all(before - after <= 1 for before, after in itertools.pairwise(history))


def test_bounds_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="autoscale is 3:2"):
        ScalingLimits(least=3, most=2)
