"""The sampling parameters that a checkpoint recommends in its `generation_config.json`. Imports no torch."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

log = logging.getLogger("dispec")


def generation_defaults(directory: str | Path | None) -> Mapping[str, Any]:
    """Return the values of `GENERATION_DEFAULTS` that the file in a checkpoint's directory has; none without a file."""
    path = None if directory is None else Path(directory) / "generation_config.json"
    if path is None or not path.is_file():
        return MappingProxyType({})
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): requests are sampled with the usual defaults", path, error)
        return MappingProxyType({})
    found = {name: stated.get(name) for name in GENERATION_DEFAULTS} if isinstance(stated, dict) else {}
    return MappingProxyType({name: value for name, value in found.items() if type(value) in (int, float)})
