"""The structure that a request asks of its output."""

import json
from collections.abc import Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass, field, fields
from typing import Any

from dispec.engine.errors import InvalidField

FIELD = "structured_outputs"
MAX_CHOICES = 10_000
MAX_JSON_BYTES = 256 * 2**10  # of a JSON Schema, of a structural tag and of all choices together
MAX_GRAMMAR_BYTES = 64 * 2**10  # of a regular expression and of a grammar
STRUCTURE_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
_FLAGS = ("disable_any_whitespace", "disable_additional_properties", "disable_fallback")
JSON_OPTIONS = ("whitespace_pattern", *_FLAGS)
_TOKEN_IDS = ("reasoning_start_token_ids", "reasoning_end_token_ids")


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
    whitespace_pattern: a regular expression of the whitespace between the tokens of JSON. By default a space, or a
        newline with an indentation, or nothing.
    disable_any_whitespace: JSON has no whitespace between its tokens.
    disable_additional_properties: objects of a JSON Schema have no properties besides those that it lists, where it
        leaves `additionalProperties` out.
    disable_fallback: accepted, because there is one grammar engine, and none to fall back to.
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
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None
    origin: str = field(default=FIELD, compare=False)
    reasoning_start_token_ids: Series[int] = ()
    reasoning_end_token_ids: Series[int] = ()
    reasoning_max_tokens: int | None = None

    def __post_init__(self) -> None:
        for flag in ("json_object", *_FLAGS):
            if not isinstance(getattr(self, flag), bool | None):
                raise self._wrong(flag, f"is {getattr(self, flag)!r:.50}, must be true or false")
            object.__setattr__(self, flag, getattr(self, flag) or None)
        given = [name for name in STRUCTURE_KINDS if getattr(self, name) is not None]
        limits_reasoning = self.reasoning_max_tokens is not None and bool(self.reasoning_end_token_ids)
        if len(given) != 1 and not (not given and limits_reasoning):
            said = f"sets {' and '.join(given)}" if given else f"sets none of {', '.join(STRUCTURE_KINDS)}"
            raise InvalidField(FIELD, f"{FIELD} {said}, must set exactly one of them")
        for name in ("json", "structural_tag"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, self._as_json(value))
        for name in ("choice", *_TOKEN_IDS):
            if (value := getattr(self, name)) is not None:
                if isinstance(value, str) or not isinstance(value, Series):
                    raise self._wrong(name, f"is {value!r:.50}, must be a list")
                object.__setattr__(self, name, tuple(value))
        most = self.reasoning_max_tokens
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            raise self._wrong("reasoning_max_tokens", f"is {most!r:.50}, must be an integer of at least 0")
        if given:
            self._check_texts(given[0])
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise self._wrong("whitespace_pattern", "is set, must be left out where disable_any_whitespace is true")
        if self.disable_additional_properties and self.json is None:
            raise self._wrong("disable_additional_properties", "is for json alone, must be left out")

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
        return next((name for name in STRUCTURE_KINDS if getattr(self, name) is not None), None)

    @property
    def label(self) -> str:
        """The place of the grammar in the request, for errors."""
        return f"{FIELD}.{self.kind or 'reasoning_max_tokens'}" if self.origin == FIELD else self.origin

    def error(self, problem: str) -> InvalidField:
        """Return the error of a grammar. problem: a JSON pointer or a verb, and the rest of the sentence."""
        field_name = self.origin.partition(".")[0]
        return InvalidField(field_name, f"{self.label}{'' if problem.startswith('/') else ' '}{problem}")

    def as_mapping(self) -> dict[str, Any]:
        """Return the fields that are set, as plain values."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) not in (None, ())}

    def _check_texts(self, kind: str) -> None:
        limit = MAX_GRAMMAR_BYTES if kind in ("regex", "grammar") else MAX_JSON_BYTES
        texts = (getattr(self, kind),) if kind not in ("choice", "json_object") else self.choice or ()
        if self.choice is not None and not 1 <= len(self.choice) <= MAX_CHOICES:
            raise self.error(f"holds {len(self.choice)} texts, must be between 1 and {MAX_CHOICES}")
        if self.whitespace_pattern is not None:
            texts = (*texts, self.whitespace_pattern)
        size = 0
        for text in texts:
            if not isinstance(text, str):
                must_be = "texts" if kind == "choice" else "a text or an object" if limit > 2**16 else "a text"
                raise self.error(f"holds {text!r:.50}, must be {must_be}")
            try:
                size += len(text.encode())
            except UnicodeEncodeError:
                raise self.error("holds half of a surrogate pair, must be Unicode text") from None
        if size > limit:
            raise self.error(f"holds {size} bytes, must be at most {limit}")

    def _as_json(self, value: Mapping[str, Any]) -> str:
        try:
            return json.dumps(value, ensure_ascii=False)
        except RecursionError:
            raise self.error("is nested too deeply") from None
        except (TypeError, ValueError) as error:
            raise self.error(f"is not JSON: {error}") from None

    def _wrong(self, name: str, problem: str) -> InvalidField:
        return InvalidField(FIELD, f"{FIELD}.{name} {problem}")
