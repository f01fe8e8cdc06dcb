"""How many workers of a kind there should be: a pure function of what was seen, so that a simulation can ask it too.

A pool grows when its work outgrows it for a while, and shrinks when fewer workers would have been idle enough for a
longer while. Between the two thresholds nothing changes (hysteresis), and after a change nothing does for some seconds
(cool-down), so a load that wavers does not make the pool flap.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class ScalingLimits:
    """Raises ValueError for bounds that cannot be meant.

    least, most: workers. grow_at, shrink_at: pressure of a worker (see `pressure`) above which more are wanted, and
    below which fewer would do. grow_seconds, shrink_seconds: for which it must last. cool_down: seconds after a change.
    attainment: share of requests that must meet their objectives; below it a pool under pressure grows.
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
        if not 0 < self.shrink_at < self.grow_at:
            raise ValueError(f"shrink_at is {self.shrink_at}, must be above 0 and below grow_at ({self.grow_at})")


class Observation(NamedTuple):
    """Of one pool, now.

    queued: requests that wait for it; capacity: how many one of its workers takes at once.
    running: requests that its workers are at; kv_usage: share of their KV blocks in use, of the fullest.
    attainment: share of the last requests that met their objectives; 1 without any.
    """

    queued: int
    running: int
    capacity: int
    kv_usage: float
    attainment: float = 1.0


@dataclass(frozen=True)
class Scaling:
    """desired: workers. above, below: since when the pressure has been so; changed: when `desired` last did."""

    desired: int
    above: float | None = None
    below: float | None = None
    changed: float = float("-inf")


def pressure(seen: Observation, workers: int) -> float:
    """How full so many workers are: 1 is as much as they can take. What waits counts as if it ran; memory counts
    from its last tenth."""
    work = (seen.queued + seen.running) / max(1, workers * seen.capacity)
    return max(work, seen.kv_usage / 0.9)


def scale(state: Scaling, seen: Observation, limits: ScalingLimits, now: float) -> Scaling:
    """The next state. It changes by as many workers as the queue calls for upwards, and by one downwards."""
    bounded = min(max(state.desired, limits.least), limits.most)
    if bounded != state.desired:
        return Scaling(bounded, changed=now)
    load = pressure(seen, state.desired)
    wants_more = load > limits.grow_at or (seen.attainment < limits.attainment and load > limits.shrink_at)
    fewer = max(1, state.desired - 1)
    # Memory in use would be that of fewer workers.
    would_be = pressure(seen._replace(kv_usage=seen.kv_usage * state.desired / fewer), fewer)
    wants_fewer = not wants_more and seen.queued == 0 and would_be < limits.shrink_at
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
