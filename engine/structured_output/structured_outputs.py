"""The structure that a request asks of its output."""

import json
from collections.abc import Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass, field, fields
from typing import Any

from dispec.engine.errors import InvalidField

FIELD = "structured_outputs"
STRUCTURE_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """A grammar that the output follows: exactly one of the first six fields. The names are vLLM's.

    None of the six is set where `reasoning_max_tokens` limits reasoning before a free answer.

    json: a JSON Schema, as a mapping or as JSON text.
    json_object: any JSON object.
    regex: a regular expression that the whole output matches.
    choice: the output is one of these texts.
    grammar: a context-free grammar in Lark's or in GBNF's (llama.cpp's) notation.
    structural_tag: free text with tags, of which each holds a JSON document; vLLM's format, as a mapping or as JSON.
    reasoning_start_token_ids, reasoning_end_token_ids: if the latter are set, the output begins with the former, and
        the grammar applies after the latter; the text between them is free.
    reasoning_max_tokens: most tokens of that text; the end marker follows then. None leaves it to `max_tokens`.
    origin: the request's field that asks for the structure, for errors; a path such as response_format.json_schema.

    Raises InvalidField for fields that do not fit together. The grammar itself is read by `GrammarCompiler`.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Series[str] | None = None
    grammar: str | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    origin: str = field(default=FIELD, compare=False)
    reasoning_start_token_ids: Series[int] = ()
    reasoning_end_token_ids: Series[int] = ()
    reasoning_max_tokens: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in STRUCTURE_KINDS if getattr(self, name) not in (None, False)]
        limits_reasoning = self.reasoning_max_tokens is not None and bool(self.reasoning_end_token_ids)
        if len(given) != 1 and not (not given and limits_reasoning):
            said = f"sets {' and '.join(given)}" if given else f"sets none of {', '.join(STRUCTURE_KINDS)}"
            raise InvalidField(FIELD, f"{FIELD} {said}, must set exactly one of them")
        for name in ("json", "structural_tag"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, json.dumps(value, ensure_ascii=False))
        for name in ("choice", "reasoning_start_token_ids", "reasoning_end_token_ids"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
        most = self.reasoning_max_tokens
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            raise InvalidField(FIELD, f"{FIELD}.reasoning_max_tokens is {most!r:.50}, must be an integer of at least 0")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "StructuredOutputs":
        """Return the structure that a mapping of the fields describes. Raises InvalidField for an unknown name."""
        names = {one.name for one in fields(cls)}
        for name in given:
            if name not in names:
                raise InvalidField(FIELD, f"{FIELD} has no {name!r:.50}, must be one of {', '.join(STRUCTURE_KINDS)}")
        return cls(**given)

    @property
    def kind(self) -> str | None:
        """The field of the grammar that is set; None for a free answer."""
        return next((name for name in STRUCTURE_KINDS if getattr(self, name) not in (None, False)), None)

    @property
    def label(self) -> str:
        """The place of the grammar in the request, for errors."""
        return f"{FIELD}.{self.kind or 'reasoning_max_tokens'}" if self.origin == FIELD else self.origin

    def error(self, problem: str) -> InvalidField:
        """Return the error of a grammar. problem: continues a sentence that begins with the place and a colon."""
        return InvalidField(self.origin.partition(".")[0], f"{self.label}: {problem}")

    def as_mapping(self) -> dict[str, Any]:
        """Return the fields that are set, as plain values."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) not in (None, ())}
