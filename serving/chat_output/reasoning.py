"""The reasoning of a model before its answer, between two markers of its family."""

from typing import NamedTuple


class ReasoningFormat(NamedTuple):
    """The markers of reasoning. name: for `--reasoning-parser`."""

    name: str
    start: str = "<think>"
    end: str = "</think>"
