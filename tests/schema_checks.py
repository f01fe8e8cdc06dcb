"""What two independent validators say about outputs."""

import json
import sys
from typing import Any

import jsonschema
import jsonschema_rs


def check_json(text: str, schema: Any) -> None:
    """Check that a text is one JSON document that fits the schema. `jsonschema_rs` checks formats as well."""
    document = json.loads(text, parse_float=_finite)
    default = jsonschema.Draft202012Validator
    jsonschema.validators.validator_for(schema, default=default)(schema).validate(document)
    jsonschema_rs.validator_for(schema, validate_formats=True).validate(document)


def _finite(text: str) -> float:
    """Return the number, or the largest one of its sign: JSON allows exponents that no float has."""
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))
