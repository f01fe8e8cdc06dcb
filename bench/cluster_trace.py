"""Requests over time for a simulated cluster or a real server: generated from a seed, or read from a file."""

import json
import random
from pathlib import Path
from typing import NamedTuple

VOCABULARY = 32000


class Request(NamedTuple):
    """arrival: seconds from the start. answer: the tokens that the simulation samples."""

    arrival: float
    prompt: list[int]
    answer: list[int]


def tokens(count: int, rng: random.Random) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def arrivals(kind: str, count: int, rate: float, rng: random.Random) -> list[float]:
    """Return `count` arrival times, `rate` a second on average: "poisson", or "bursty" (gamma-distributed pauses with a
    coefficient of variation of 3)."""
    shape = 1 / 9 if kind == "bursty" else 1.0
    now, times = 0.0, []
    for _ in range(count):
        now += rng.gammavariate(shape, 1 / (rate * shape))
        times.append(now)
    return times


def make_trace(kind: str, count: int, rate: float, prompt_tokens: int, output_tokens: int, seed: int) -> list[Request]:
    """Return requests with lengths from half to one and a half times the mean.

    "multi-turn": conversations of four turns on one of eight shared system prompts; each turn's prompt is the
    conversation so far, and comes 30 s after the one before on average. Raises ValueError for an unknown kind.
    """
    if kind not in ("poisson", "bursty", "multi-turn"):
        raise ValueError(f"trace is {kind!r}, must be poisson, bursty, multi-turn or the path of a JSON lines file")
    rng = random.Random(seed)

    def about(mean: int) -> int:
        return rng.randint(max(1, mean // 2), max(1, mean * 3 // 2))

    if kind != "multi-turn":
        return [
            Request(at, tokens(about(prompt_tokens), rng), tokens(about(output_tokens), rng))
            for at in arrivals(kind, count, rate, rng)
        ]
    systems = [tokens(prompt_tokens, rng) for _ in range(8)]
    found: list[Request] = []
    for at in arrivals("poisson", -(-count // 4), rate / 4, rng):
        history, now = list(rng.choice(systems)), at
        for _ in range(4):
            prompt, answer = history + tokens(about(prompt_tokens // 4 + 1), rng), tokens(about(output_tokens), rng)
            found.append(Request(now, prompt, answer))
            history, now = prompt + answer, now + rng.expovariate(1 / 30)
    return sorted(found)[:count]


def read_trace(path: Path, seed: int) -> list[Request]:
    """Read lines of JSON with `arrival`, `prompt_tokens` and `output_tokens`; lines of the same `session` share the
    longest prefix that their lengths allow. Raises ValueError with the line that cannot be read."""
    rng, found = random.Random(seed), []
    sessions: dict[str, list[int]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            arrival, size, output = float(entry["arrival"]), int(entry["prompt_tokens"]), int(entry["output_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from error
        if size < 1 or output < 1:
            raise ValueError(f"{path}, line {number}: prompt_tokens and output_tokens must be at least 1")
        history = sessions.setdefault(str(entry.get("session", f"line {number}")), [])
        history += tokens(max(0, size - len(history)), rng)
        found.append(Request(arrival, history[:size], tokens(output, rng)))
    return sorted(found)
