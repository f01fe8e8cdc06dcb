"""The number of torch's CPU threads, which all engines of a process share."""

import torch

_before: int | None = None  # the number before any engine set it
_set: int | None = None  # the number that an engine set last


def default_threads() -> int:
    """Return the number without engines: one engine's number is not the default of the next."""
    current = torch.get_num_threads()
    return _before if _before is not None and current == _set else current


def set_threads(number: int) -> None:
    """Set torch's number for an engine."""
    global _before, _set
    _before, _set = default_threads(), number
    if number != torch.get_num_threads():  # setting it starts a pool of threads
        torch.set_num_threads(number)
