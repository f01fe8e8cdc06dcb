"""The number of torch's CPU threads, of which a process has one for all its engines."""

import torch

_before: int | None = None  # what it was when an engine first set it
_set: int | None = None  # what an engine set last


def default_threads() -> int:
    """Return the number that holds without engines: what one engine set is no default for the next."""
    current = torch.get_num_threads()
    return _before if _before is not None and current == _set else current


def set_threads(number: int) -> None:
    """Set torch's number for an engine."""
    global _before, _set
    _before, _set = default_threads(), number
    if number != torch.get_num_threads():  # setting it starts threads of a pool that is of no use
        torch.set_num_threads(number)
