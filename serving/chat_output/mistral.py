"""Tool calls of Mistral's models: behind a special token, as a list of objects or, in newer models, name by name."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from dispec.serving.chat_output.base_format import BaseFormat
from dispec.serving.chat_output.call_grammar import CallRules, arguments_rule, calls_grammar, literal
from dispec.serving.chat_output.call_stream import CallStream, random_id
from dispec.serving.chat_output.tool_turns import with_short_ids
from dispec.serving.chat_output.tools import Tool, ToolRequest

_CALLS, _ARGS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ID_LENGTH = 9  # of letters and digits: the templates demand it

_NAME = r"\s*([a-zA-Z0-9_-]{1,64})"
_NAMED = re.compile(_NAME + r"\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*)?(?=\{)")
_MAY_BE_NAMED = re.compile(r"\s*[a-zA-Z0-9_-]{0,64}\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[[A-Z_]*\]?\s*)?")


class MistralFormat(BaseFormat):
    """`[TOOL_CALLS][{"name": …, "arguments": …}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` for each call.

    is_by_name: whether the grammar writes the newer form. The parser reads both.
    """

    name = "mistral"
    special_tokens: tuple[str, ...] = (_CALLS, _ARGS, _CALL_ID)

    def __init__(self, vocabulary: Mapping[str, int], knows_tools: bool, is_by_name: bool) -> None:
        super().__init__(vocabulary, knows_tools)
        self._is_by_name = is_by_name

    def parser(self, request: ToolRequest) -> CallStream:
        """Return the parser of one choice."""
        return _MistralStream(request, markers=(_CALLS,), new_id=lambda: random_id(_ID_LENGTH))

    def structure(self, request: ToolRequest) -> StructuredOutputs | None:
        """Return the grammar of the answer; None is free text."""
        rule = self._named_rules if self._is_by_name else self._listed_rules
        rules = [rule(tool) for tool in request.callable_tools]
        end = "" if self._is_by_name else literal("]")
        marker_id = self._vocabulary.get(_CALLS)
        return calls_grammar(request, rules, not_in_text=re.escape(_CALLS), marker_id=marker_id, end=end)

    def fit_turns(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return the messages with ids that the template accepts."""
        return with_short_ids(messages)

    def write_call(self, name: str, arguments: str) -> str:
        """Return the text of a call."""
        if self._is_by_name:
            return f"{_CALLS}{name}{_ARGS}{arguments}"
        return f'{_CALLS}[{{"name": "{name}", "arguments": {arguments}}}]'

    def _named_rules(self, tool: Tool) -> CallRules:
        call = f"{literal(tool.name)} {self._marker(_ARGS)} {arguments_rule(tool)}"
        return CallRules(_CALLS, call, f"{self._marker(_CALLS)} {call}")

    def _listed_rules(self, tool: Tool) -> CallRules:
        begin, end = f'{{"name": "{tool.name}", "arguments": ', literal("}")
        rest = f"{arguments_rule(tool)} {end}"
        return CallRules(_CALLS, f"{literal('[' + begin)} {rest}", f"{literal(', ' + begin)} {rest}")

    def _marker(self, marker: str) -> str:
        token = self._vocabulary.get(marker)
        return literal(marker) if token is None else f"<[{token}]>"


class _MistralStream(CallStream):
    def _begin_call(self) -> bool:
        rest = self._text[self._call :].lstrip()
        position = len(self._text) - len(rest)
        if rest.startswith("["):
            self._is_list = True
            return self._begin_object(position + 1, position + 1)
        self._is_list = False
        if rest.startswith("{"):
            return self._begin_object(position, self._no_call)
        named = _NAMED.match(rest)
        if named is not None and named[1] in self._names:
            self._start_call(named[1], position + named.end())
            return self._stream_arguments(self._after_call)
        may_be_call = named is None and not self._is_final and _MAY_BE_NAMED.fullmatch(rest) is not None
        return not may_be_call and self._give_up()

    def _after_call(self) -> bool:
        if not self._is_list:
            return self._go(self._read_text)
        rest = self._text.lstrip()
        if not rest:
            return False
        if rest[0] == ",":
            length = len(self._text) - len(rest) + 1
            return self._begin_object(length, length)
        return self._skip("]")
