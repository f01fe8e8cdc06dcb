"""Grammars of answers with tool calls, in llguidance's dialect of Lark."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dispec.engine.errors import InvalidField
from dispec.engine.structured_output.json_schema import SchemaError, enforceable_schema
from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from dispec.serving.chat_output.tools import Tool, ToolRequest

MAX_CALLS = 16  # in one answer with a grammar, so that it ends
# Separators as models are trained on them, and no other white space, which could go on for ever.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Keywords beside which `additionalProperties` is not added to the schema of arguments.
COMBINED = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "if")


class CallRules(NamedTuple):
    """One tool's calls. beginning: the text that begins an answer's first call. rest: rules of what follows it.

    following: rules of a further call, with what separates it from the one before.
    definitions: of rules that they use.
    """

    beginning: str
    rest: str
    following: str
    definitions: tuple[str, ...] = ()


def literal(text: str) -> str:
    """Return a rule for a text."""
    return json.dumps(text) if text else ""


def arguments_rule(tool: Tool) -> str:
    """Return a rule for a tool's arguments in JSON."""
    schema: dict[str, Any] = {"type": "object", **tool.parameters}
    if not any(name in schema for name in COMBINED):
        schema.setdefault("additionalProperties", False)
    return tool_rule(tool, schema)


def tool_rule(tool: Tool, schema: Mapping[str, Any], **options: Any) -> str:
    """Return a rule for JSON of a tool's arguments. Raises InvalidField for a strict tool's schema that cannot be
    enforced; a keyword of another tool is ignored then.

    options: llguidance's.
    """
    try:
        return _json_rule(schema, options)
    except SchemaError as error:
        if tool.is_strict:
            said = f"tools: {error.pointer or 'the schema'} of the parameters of {tool.name!r} {error}"
            raise InvalidField("tools", said) from None
        plain = {name: value for name, value in schema.items() if name != "x-guidance"}
        return _json(plain, {"lenient": True, **options})


def _json_rule(schema: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Return a rule for JSON that follows a schema. Raises SchemaError for one that cannot be enforced."""
    return _json(enforceable_schema(schema), options)


def _json(schema: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {**_JSON_OPTIONS, **options}})


def with_answer(calls: StructuredOutputs, answer: StructuredOutputs) -> StructuredOutputs:
    """Return the grammar of an answer that is either `calls`, a grammar of this module, or JSON.

    Raises InvalidField for an answer that is asked for in another way than by a JSON Schema or as any object.
    """
    if answer.json is None and not answer.json_object:
        raise answer.error("must be JSON, or left out, in a request with tools")
    schema = json.loads(str(answer.json)) if answer.json is not None else {"type": "object"}
    if not isinstance(schema, dict):
        raise answer.error("must be an object in a request with tools")
    try:
        rule = _json_rule(schema, {})
    except SchemaError as error:
        raise answer.error(f"{error.pointer} {error}") from None
    either = f"\nstart: calls | answer\nanswer: {rule}\ncalls: "
    return replace(answer, json=None, json_object=None, grammar=str(calls.grammar).replace("\nstart: ", either, 1))


def calls_grammar(
    request: ToolRequest,
    rules: Sequence[CallRules],
    not_in_text: str,
    begins_line: bool = False,
    marker_id: int | None = None,
    end: str = "",
) -> StructuredOutputs | None:
    """Return the grammar of an answer that calls tools. None for free text.

    not_in_text: a regular expression of what the text before calls cannot hold, because the parser takes it for a call;
        in its lines' beginnings, if `begins_line`.
    marker_id: the token that is the beginning of calls, if they have one.
    end: rules of what follows the last call.
    """
    is_auto = request.choice == "auto"
    is_free = is_auto and request.is_parallel and not any(tool.is_strict for tool in request.tools)
    if is_free or not rules:
        return None
    by_beginning: dict[str, list[CallRules]] = {}
    for rule in rules:
        by_beginning.setdefault(rule.beginning, []).append(rule)
    lines, first = [], []
    for index, (text, group) in enumerate(by_beginning.items()):
        begin = literal(text) if marker_id is None else f"<[{marker_id}]>"
        if is_auto and marker_id is None:
            lines.append(f"begin_{index}[lazy]: BEFORE {begin}")
            begin = f"begin_{index}"
        elif is_auto:
            begin = f"TEXT {begin}"
        first.append(f"{begin} ({' | '.join(rule.rest for rule in group)})")
    is_single = request.named is not None or not request.is_parallel
    more = "" if is_single else f"following{{0,{MAX_CALLS - 1}}}"
    calls = [f"first: {' | '.join(first)}", f"following: {' | '.join(rule.following for rule in rules)}"]
    definitions = [definition for rule in rules for definition in rule.definitions]
    start = f"start: first {more} {end}"
    if is_auto:
        before = r"((?s:.*)\n)?" if begins_line else "(?s:.*)"
        indent = r"[ \t]*" if begins_line else ""
        lines.append(f"CALL: /{before}{indent}({not_in_text})(?s:.*)/")
        # A negation also matches what is not UTF-8, hence the intersections.
        lines += ["TEXT: /(?s:.*)/ & ~CALL", f"BEFORE: /{before}/ & ~CALL"]
        start = f"start: TEXT | first {more} {end}"
    text = "\n".join(["%llguidance {}", start, *calls, *lines, *definitions])
    return StructuredOutputs(grammar=text, origin="tools")
