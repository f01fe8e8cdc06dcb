"""Service-level objectives: targets of request classes, and the order of waiting requests that follows from them.

Waiting requests are ordered by the latest moment at which they can start and still meet their TTFT target (least slack
first). That moment is fixed at arrival, so no request starves. All functions are pure.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

DEFAULT_TTFT = 10.0  # seconds, assumed for requests without a target when others have one
DEFAULT_CLASS = "default"  # the class of requests that name none, if it exists


class Slo(NamedTuple):
    """Targets of a request class. ttft: seconds to the first token; itl: mean seconds between tokens."""

    name: str
    ttft: float = math.inf
    itl: float = math.inf

    def is_met(self, first_token: float | None, gaps: Sequence[float]) -> bool:
        """Return whether a request met its targets: seconds to its first token, and between its tokens."""
        if first_token is None or first_token > self.ttft:
            return False
        return not gaps or sum(gaps) / len(gaps) <= self.itl


def parse_slo(text: str) -> Slo:
    """Read `NAME:ttft=0.5,itl=0.05`. Raises ValueError."""
    name, _, targets = text.partition(":")
    values: dict[str, float] = {}
    for target in targets.split(","):
        key, _, value = target.partition("=")
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = math.nan
        if key not in ("ttft", "itl") or not 0 < values[key] < 1e6:
            raise ValueError(f"slo is {text!r}, must be NAME:ttft=SECONDS,itl=SECONDS, or one of the two")
    if not name or not name.isascii() or not name.isprintable() or len(name) > 64 or '"' in name:
        raise ValueError(f"slo is {text!r}, its name must have 1 to 64 printable ASCII characters")
    return Slo(name, **values)


def slack(slo: Slo | None, num_prompt_tokens: int, tokens_per_second: float) -> float:
    """Return the seconds, at least 0, that a prompt can wait: its TTFT target less the time to compute it.

    tokens_per_second: measured prefill throughput; 0 if unknown.
    """
    ttft = DEFAULT_TTFT if slo is None or math.isinf(slo.ttft) else slo.ttft
    return max(0.0, ttft - (num_prompt_tokens / tokens_per_second if tokens_per_second else 0.0))


def can_meet_ttft(slo: Slo, num_tokens: int, tokens_per_second: float) -> bool:
    """Return whether a first token can come in time after `num_tokens`: the prompt's own and those ahead of it."""
    return not tokens_per_second or num_tokens / tokens_per_second <= slo.ttft
