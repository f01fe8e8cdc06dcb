"""The sampling parameters that a checkpoint recommends in its `generation_config.json`. Imports no torch."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dispec.engine.sampling_params import SamplingParams

GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

log = logging.getLogger("dispec")


def generation_defaults(directory: str | Path | None) -> Mapping[str, Any]:
    """Return the values of `GENERATION_DEFAULTS` that the file in a checkpoint's directory has; none without a file.

    Values that are no numbers are left out; those that break a limit of `SamplingParams` too, with a warning.
    """
    path = None if directory is None else Path(directory) / "generation_config.json"
    if path is None or not path.is_file():
        return MappingProxyType({})
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): requests are sampled with the usual defaults", path, error)
        return MappingProxyType({})
    found = {name: stated.get(name) for name in GENERATION_DEFAULTS} if isinstance(stated, dict) else {}
    return MappingProxyType({name: value for name, value in found.items() if _is_valid(path, name, value)})


def _is_valid(path: Path, name: str, value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        SamplingParams(**{name: value})
    except ValueError as error:
        log.warning("%s: %s: requests are sampled with the usual default", path, error)
        return False
    return True
