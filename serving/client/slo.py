"""Service-level objectives: what a class of requests was promised, and what follows for who goes first and who cannot.

Waiting requests are ordered by the latest moment at which they could begin and still have their first token in time
(least slack first). That moment is fixed when a request comes, so nobody is overtaken for ever. All functions are pure.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

DEFAULT_TTFT = 10.0  # seconds, of requests without a class, where there are classes
DEFAULT_CLASS = "default"  # the name of the class of requests that name none, if there is one


class Slo(NamedTuple):
    """A class of requests. ttft: seconds to the first token; itl: mean seconds between tokens."""

    name: str
    ttft: float = math.inf
    itl: float = math.inf

    def is_met(self, first_token: float | None, gaps: Sequence[float]) -> bool:
        """Whether a request kept it: seconds to its first token, and between its tokens."""
        if first_token is None or first_token > self.ttft:
            return False
        return not gaps or sum(gaps) / len(gaps) <= self.itl


def parse_slo(text: str) -> Slo:
    """From `NAME:ttft=0.5,itl=0.05`. Raises ValueError."""
    name, _, stated = text.partition(":")
    values: dict[str, float] = {}
    for part in stated.split(","):
        key, _, value = part.partition("=")
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = math.nan
        if key not in ("ttft", "itl") or not 0 < values[key] < 1e6:
            raise ValueError(f"slo is {text!r}, must be NAME:ttft=SECONDS,itl=SECONDS, or one of the two")
    if not name or not name.isascii() or not name.isprintable() or len(name) > 64 or '"' in name:
        raise ValueError(f"slo is {text!r}, whose name must have 1 to 64 printable ASCII characters")
    return Slo(name, **values)


def slack(slo: Slo | None, prompt_tokens: int, tokens_per_second: float) -> float:
    """Seconds that a prompt can wait: what is left of its time when computing it is taken off, at least 0.

    tokens_per_second: of prompts, as measured; 0 if that is not known.
    """
    ttft = DEFAULT_TTFT if slo is None or math.isinf(slo.ttft) else slo.ttft
    return max(0.0, ttft - (prompt_tokens / tokens_per_second if tokens_per_second else 0.0))


def is_hopeless(slo: Slo | None, prompt_tokens: int, tokens_before: int, tokens_per_second: float) -> bool:
    """Whether a first token cannot come in time, even if everything before it goes at the measured rate."""
    if slo is None or not tokens_per_second:
        return False
    return (tokens_before + prompt_tokens) / tokens_per_second > slo.ttft
