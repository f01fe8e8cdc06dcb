"""Tool calls of Llama 3.2 and Llama 4 as a Python list of calls: `[get_weather(city="Paris"), get_time()]`."""

import json
import keyword
import re

from dispec.engine.errors import InvalidField
from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from dispec.serving.chat_output.base_format import BaseFormat
from dispec.serving.chat_output.call_grammar import COMBINED, CallRules, calls_grammar, literal, tool_rule
from dispec.serving.chat_output.call_stream import CallStream
from dispec.serving.chat_output.json_calls import PYTHON_TAG
from dispec.serving.chat_output.python_text import ClosingParenthesis, keyword_arguments
from dispec.serving.chat_output.tools import Tool, ToolRequest

_NAME = re.compile(r"\s*([a-zA-Z0-9_-]{1,64})\s*\(")
_ESCAPES = 'nrbtf\\"'  # those of JSON strings that Python reads in the same way
_MAY_BE_NAME = re.compile(r"\s*([a-zA-Z0-9_-]{0,64})\s*")


class PythonicFormat(BaseFormat):
    """A list of calls with keyword arguments at the beginning of a line, behind `<|python_tag|>` or not."""

    name = "pythonic"
    special_tokens: tuple[str, ...] = (PYTHON_TAG,)

    def parser(self, request: ToolRequest) -> CallStream:
        """Return the parser of one choice."""
        return _PythonicStream(request, markers=(PYTHON_TAG,), bracket="[")

    def structure(self, request: ToolRequest) -> StructuredOutputs | None:
        """Return the grammar of the answer; None is free text.

        Raises InvalidField for parameters that keyword arguments cannot follow.
        """
        rules = [_rules(tool, index) for index, tool in enumerate(request.callable_tools)]
        names = "|".join(tool.name for tool in request.callable_tools)
        not_in_text = rf"\[\s*({names})\s*\("
        return calls_grammar(request, rules, not_in_text, begins_line=True, end=literal("]"))

    def write_call(self, name: str, arguments: str) -> str:
        """Return the text of a call, with values as JSON spells them, as in the grammar."""
        try:
            given = json.loads(arguments)
        except ValueError:  # the form in a description
            return f"[{name}(<argument>=<value>)]"
        given = given if isinstance(given, dict) else {}
        written = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items())
        return f"[{name}({', '.join(written)})]"


class _PythonicStream(CallStream):
    def _begin_call(self) -> bool:
        rest = self._text[self._call :].lstrip()
        if rest.startswith("["):
            position = len(self._text) - len(rest) + 1
            return self._begin_python_call(position, max(position, self._no_call))
        return bool(rest or self._is_final) and self._give_up()

    def _begin_python_call(self, start: int, no_call: int) -> bool:
        self._call, self._no_call = start, no_call
        self._scanner: ClosingParenthesis | None = None
        return self._go(self._read_call)

    def _read_call(self) -> bool:
        name = _NAME.match(self._text, self._call)
        if name is None or name[1] not in self._names:
            begun = _MAY_BE_NAME.fullmatch(self._text, self._call)
            may_be_call = begun is not None and any(known.startswith(begun[1]) for known in self._names)
            return (self._is_final or not may_be_call) and self._give_up()
        if self._scanner is None:
            self._scanner = ClosingParenthesis(name.end())
        end = self._scanner.find(self._text)
        if end is None:
            return self._is_final and self._give_up(len(self._text))
        arguments = keyword_arguments(self._text[name.end() : end - 1])
        if arguments is None:
            return self._give_up(end)
        self._add_whole_call(name[1], arguments, end)
        return self._go(self._after_call)

    def _after_call(self) -> bool:
        rest = self._text.lstrip()
        if not rest:
            return False
        if rest[0] == ",":
            length = len(self._text) - len(rest) + 1
            return self._begin_python_call(length, length)
        return self._skip("]")


def _rules(tool: Tool, index: int) -> CallRules:
    """Return the rules of a call whose keyword arguments come in the order of the schema's properties."""
    schema = tool.parameters
    properties = schema.get("properties") or {}
    required = set(schema.get("required") or ())
    unknown = sorted(required - set(properties)) + [name for name in properties if not _is_keyword(name)]
    combined = [name for name in COMBINED if name in schema]
    if tool.is_strict and (unknown or combined):
        said = (
            f"the parameters of {tool.name!r} have {(unknown + combined)[0]!r:.50}, which strict calls in Python lack"
        )
        raise InvalidField("tools", f"tools: {said}: leave strict out")
    names = [name for name in properties if _is_keyword(name)]
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    definitions = []
    for number, name in enumerate(names):
        value = properties[name] if isinstance(properties[name], dict) else {}
        rule = tool_rule(tool, {**value, **shared}, json_allowed_escapes=_ESCAPES)
        definitions.append(f"call_{index}_{number}: {literal(f'{name}=')} {rule}")
    alternatives = []
    for first, name in enumerate(names):
        others = (
            f'", " call_{index}_{number}' if names[number] in required else f'(", " call_{index}_{number})?'
            for number in range(first + 1, len(names))
        )
        alternatives.append(" ".join([f"call_{index}_{first}", *others]))
        if name in required:
            break
    is_optional = required.isdisjoint(names)
    arguments = f"({' | '.join(alternatives)}){'?' if is_optional else ''}" if names else ""
    call = f"{arguments} {literal(')')}"
    return CallRules(f"[{tool.name}(", call, f"{literal(f', {tool.name}(')} {call}", tuple(definitions))


def _is_keyword(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)
