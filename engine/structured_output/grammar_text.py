"""Writes the grammar of a structure in llguidance's form."""

import json
import re
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from dispec.engine.structured_output.json_schema import SchemaError, enforceable_schema, patterns_of, read_schema
from dispec.engine.structured_output.structural_tag import TagError, TagWriter
from dispec.engine.structured_output.structured_outputs import StructuredOutputs

# A space, or a newline and an indentation: what `json.dumps` writes with and without `indent`. Small models repeat
# newlines without end where any whitespace is allowed. llguidance matches the pattern once between two tokens.
_WHITESPACE = r"[ ]|\n(?:[ ]{0,32}|\t{0,8})"
# Without \u and \/: escapes that spell a name in a second way would pass `additionalProperties` for a listed one.
_ESCAPES = '"\\bfnrt'
# A schema with a control character, in its JSON or in a pattern, needs \u: without it llguidance drops the character.
_CONTROL_CHARACTER = re.compile(r"\\u00|\\\\[xuavcp0]|\[:")


def grammar_text(structure: StructuredOutputs) -> str:
    """Return the grammar. Raises InvalidField for one that cannot be enforced, with the place."""
    if structure.json is not None:
        return _json(structure, _read(structure))
    if structure.json_object:
        return _json(structure, {"type": "object"})
    if structure.regex is not None:
        return LLMatcher.grammar_from_regex(structure.regex)
    if structure.choice is not None:
        return LLMatcher.grammar_from_lark(_choice(structure.choice))
    if structure.grammar is not None:
        return _context_free(structure)
    return _structural_tag(structure)


def fixed_texts(structure: StructuredOutputs) -> Iterator[str]:
    """Yield the texts that an output has letter by letter: choices, and names and constants of a JSON Schema."""
    yield from structure.choice or ()
    if structure.json is not None:
        for text in _constants(json.loads(str(structure.json))):
            yield json.dumps(text, ensure_ascii=False)  # as an output writes it


def _constants(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for name, value in schema.items():
            if name == "properties" and isinstance(value, dict):
                yield from value
            yield from _strings(value) if name in ("const", "enum") else _constants(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _constants(item)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _strings(item)


def explain(structure: StructuredOutputs, error: str) -> str:
    """Return llguidance's error of a grammar as the rest of a sentence, with its place where that is known."""
    said = next((line.strip() for line in reversed(error.splitlines()) if line.strip().startswith("error: ")), "")
    lines = error.replace("<non-verbose/>", "").splitlines()
    said = said.removeprefix("error: ") or (lines[0].strip() if lines else "")
    if "NoExtension" in said or not said:
        return "allows no output"
    if structure.json is not None:
        for pointer, pattern in patterns_of(json.loads(str(structure.json))):
            if pattern in error:
                return f"{pointer} is {pattern!r:.60}, which cannot be compiled: {said:.200}"
    return f"cannot be compiled: {said:.300}"


def _read(structure: StructuredOutputs) -> Any:
    try:
        schema = read_schema(str(structure.json))
        return enforceable_schema(schema, refuses_additional=bool(structure.disable_additional_properties))
    except SchemaError as error:
        raise structure.error(f"{error.pointer} {error}" if error.pointer else str(error)) from None


def _json(structure: StructuredOutputs, schema: Any) -> str:
    if schema is False:
        raise structure.error("is false, which allows no output")
    return LLMatcher.grammar_from_json_schema(json.dumps(_with_options(structure, schema), ensure_ascii=False))


def _with_options(structure: StructuredOutputs, schema: Any) -> dict[str, Any]:
    """Return a schema with llguidance's options of JSON."""
    needs_codes = _CONTROL_CHARACTER.search(json.dumps(schema, ensure_ascii=False)) is not None
    options: dict[str, Any] = {"json_allowed_escapes": _ESCAPES + "u" * needs_codes}
    if structure.disable_any_whitespace:
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = structure.whitespace_pattern or _WHITESPACE
    return {"x-guidance": options, **({} if schema is True else schema)}


def _choice(texts: tuple[str, ...] | Any) -> str:
    """Return a Lark grammar of some texts, as one terminal, which a parser reads in one item."""
    several = " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts) if text)
    if not several:
        return 'start: ""'
    return f"start: CHOICE{'?' if '' in texts else ''}\nCHOICE: {several}"


def _context_free(structure: StructuredOutputs) -> str:
    assert structure.grammar is not None
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(structure.grammar))
    except RecursionError:
        raise structure.error("is nested too deeply") from None
    except Exception as error:  # the converter raises several kinds
        raise structure.error(f"cannot be read: {error!s:.200}") from None


def _structural_tag(structure: StructuredOutputs) -> str:
    try:
        tag = read_schema(str(structure.structural_tag))
        return TagWriter(lambda schema: json.dumps(_with_options(structure, schema), ensure_ascii=False)).grammar(tag)
    except SchemaError as error:
        raise structure.error(f"{error.pointer} {error}" if error.pointer else str(error)) from None
    except TagError as error:
        raise structure.error(f"{error.place} {error}" if error.place else str(error)) from None
    except RecursionError:
        raise structure.error("is nested too deeply") from None
