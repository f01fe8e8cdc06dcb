"""JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from dispec.engine.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, empty without a file. Raises CheckpointError for anything else."""
    if not path.is_file():
        return {}
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): download it again") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} is not a JSON object: download it again")
    return contents
