"""The number of workers of a role, as a pure function of observations.

A pool grows when it has been under pressure for a while, and shrinks when fewer workers would have been idle enough for
a longer while. Between the two thresholds nothing changes (hysteresis), nor for some seconds after a change: a load
that wavers does not make the pool flap.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class ScalingLimits:
    """Raises ValueError for bounds that contradict each other.

    least, most: workers. grow_at, shrink_at: pressure of a worker (see `pressure`) above which more are wanted, and
    below which fewer are enough. grow_seconds, shrink_seconds: how long that must last. cool_down: seconds after a
    change. attainment: share of requests that must meet their objectives; below it a pool under pressure grows.
    """

    least: int
    most: int
    grow_at: float = 1.0
    shrink_at: float = 0.5
    grow_seconds: float = 2.0
    shrink_seconds: float = 30.0
    cool_down: float = 10.0
    attainment: float = 0.9

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= 1024:
            raise ValueError(f"autoscale is {self.least}:{self.most}, must be MIN:MAX with 1 <= MIN <= MAX <= 1024")


class Observation(NamedTuple):
    """The current load of one role.

    queued, running: work that waits, and work that its workers have started, in any unit. capacity: of one worker, in
        the same unit.
    kv_usage: share of KV blocks in use, of the fullest worker.
    attainment: share of the last requests that met their objectives; 1 without any.
    """

    queued: int
    running: int
    capacity: int
    kv_usage: float
    attainment: float = 1.0


@dataclass(frozen=True)
class Scaling:
    """State of the policy. desired: workers. above, below: time since which the pressure has been too high or too low;
    changed: time of the last change of `desired`."""

    desired: int
    above: float | None = None
    below: float | None = None
    changed: float = float("-inf")


def pressure(seen: Observation, workers: int) -> float:
    """Return how full a number of workers is: 1 is the most that they can take. Waiting work counts as running work;
    memory counts as full at 90 %."""
    work = (seen.queued + seen.running) / max(1, workers * seen.capacity)
    return max(work, seen.kv_usage / 0.9)


def scale(state: Scaling, seen: Observation, limits: ScalingLimits, now: float) -> Scaling:
    """Return the next state. It grows by as many workers as the queue requires, at most twofold, and shrinks by one."""
    bounded = min(max(state.desired, limits.least), limits.most)
    if bounded != state.desired:
        return Scaling(bounded, changed=now)
    load = pressure(seen, state.desired)
    wants_more = load > limits.grow_at or (seen.attainment < limits.attainment and load > limits.shrink_at)
    fewer = max(1, state.desired - 1)
    # Fewer workers would hold the same blocks.
    load_of_fewer = pressure(seen._replace(kv_usage=seen.kv_usage * state.desired / fewer), fewer)
    wants_fewer = not wants_more and seen.queued == 0 and load_of_fewer < limits.shrink_at
    state = replace(
        state,
        above=(now if state.above is None else state.above) if wants_more else None,
        below=(now if state.below is None else state.below) if wants_fewer else None,
    )
    if now - state.changed < limits.cool_down:
        return state
    if state.above is not None and now - state.above >= limits.grow_seconds and state.desired < limits.most:
        needed = -(-(seen.queued + seen.running) // max(1, seen.capacity))
        return Scaling(min(max(state.desired + 1, min(needed, 2 * state.desired)), limits.most), changed=now)
    if state.below is not None and now - state.below >= limits.shrink_seconds and state.desired > limits.least:
        return Scaling(state.desired - 1, changed=now)
    return state
