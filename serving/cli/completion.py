"""What the shell's Tab key offers for the values of options."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dispec.engine.loading.model_source import hub_ids_in_cache, models_in


def complete_model(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a completion of models: the given names, hub ids in the cache, and models in the directory typed so far.

    Without any, the shell completes paths.
    """

    def complete(incomplete: str) -> list[str]:
        folder = incomplete[: len(incomplete) - len(os.path.basename(incomplete))]
        local = (folder + name for name in models_in(Path(folder or ".").expanduser()))
        return [name for name in (*names, *hub_ids_in_cache(), *local) if name.startswith(incomplete)]

    return complete


def complete_choices(choices: Iterable[Any]) -> Callable[[str], list[str]]:
    """Return a completion of an option with fixed values."""

    def complete(incomplete: str) -> list[str]:
        return [text for text in map(str, choices) if text.startswith(incomplete)]

    return complete
