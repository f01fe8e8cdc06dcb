"""The structure that a request asks of its output."""

import json
from collections.abc import Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass, fields
from typing import Any

from dispec.engine.errors import InvalidField

FIELD = "structured_outputs"
_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """A grammar that the output follows: exactly one of the first six fields. The names are vLLM's.

    json: a JSON Schema, as a mapping or as JSON text.
    json_object: any JSON object.
    regex: a regular expression that the whole output matches.
    choice: the output is one of these texts.
    grammar: a context-free grammar in Lark's or in GBNF's (llama.cpp's) notation.
    structural_tag: free text with tags, of which each holds a JSON document; vLLM's format, as a mapping or as JSON.
    reasoning_start_token_ids, reasoning_end_token_ids: if the latter are set, the output begins with the former, and
        the grammar applies after the latter; the text between them is free.

    Raises InvalidField for fields that do not fit together. The grammar itself is read by `GrammarCompiler`.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Series[str] | None = None
    grammar: str | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    reasoning_start_token_ids: Series[int] = ()
    reasoning_end_token_ids: Series[int] = ()

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            said = f"sets {' and '.join(given)}" if given else f"sets none of {', '.join(_KINDS)}"
            raise InvalidField(FIELD, f"{FIELD} {said}, must set exactly one of them")
        for name in ("json", "structural_tag"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, json.dumps(value, ensure_ascii=False))
        for name in ("choice", "reasoning_start_token_ids", "reasoning_end_token_ids"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "StructuredOutputs":
        """Return the structure that a mapping of the fields describes. Raises InvalidField for an unknown name."""
        names = {field.name for field in fields(cls)}
        for name in given:
            if name not in names:
                raise InvalidField(FIELD, f"{FIELD} has no {name!r:.50}, must be one of {', '.join(_KINDS)}")
        return cls(**given)

    @property
    def kind(self) -> str:
        """The field of the grammar that is set."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))

    def as_mapping(self) -> dict[str, Any]:
        """Return the fields that are set, as plain values."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) not in (None, ())}
