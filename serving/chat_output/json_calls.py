"""Tool calls that are JSON objects in the text: Llama 3's, and the generic form for models without one of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from dispec.serving.chat_output.base_format import BaseFormat
from dispec.serving.chat_output.call_grammar import CallRules, arguments_rule, calls_grammar, literal
from dispec.serving.chat_output.call_stream import CallStream
from dispec.serving.chat_output.tool_turns import one_call_a_message
from dispec.serving.chat_output.tools import Tool, ToolRequest

# What the parser takes for a call where it begins a line.
_CALL = r'\{\s*"(name|arguments|parameters|type|id|function)"'
PYTHON_TAG = "<|python_tag|>"
_BLOCK, _END_OF_BLOCK = "```json", "```"


class JsonFormat(BaseFormat):
    """`{"name": …, "arguments": …}`, each call in lines of its own, in a Markdown block or not."""

    name = "json"
    _arguments = "arguments"
    _separator = "\n"

    def parser(self, request: ToolRequest) -> CallStream:
        """Return the parser of one choice."""
        return _JsonStream(request, markers=(_BLOCK,), bracket="{")

    def structure(self, request: ToolRequest) -> StructuredOutputs | None:
        """Return the grammar of the answer; None is free text."""
        rules = [self._rules(tool) for tool in request.callable_tools]
        return calls_grammar(request, rules, not_in_text=_CALL, begins_line=True)

    def write_call(self, name: str, arguments: str) -> str:
        """Return the text of a call."""
        return f'{{"name": "{name}", "{self._arguments}": {arguments}}}'

    def _rules(self, tool: Tool) -> CallRules:
        begin, end = '{"name": "', literal("}")
        head = literal(f'{tool.name}", "{self._arguments}": ')
        call = f"{head} {arguments_rule(tool)} {end}"
        return CallRules(begin, call, f"{literal(self._separator + begin)} {call}")


class _JsonStream(CallStream):
    _is_in_block = False

    def _begin_call(self) -> bool:
        self._is_in_block = self._is_in_block or self._call == self._no_call  # behind a marker
        return self._begin_object(self._call, self._no_call)

    def _after_call(self) -> bool:
        rest = self._text.lstrip()
        if not self._is_in_block or rest.startswith("{"):
            return self._go(self._read_text)
        self._is_in_block = not rest.startswith(_END_OF_BLOCK)
        return self._skip(_END_OF_BLOCK)


class Llama3JsonFormat(JsonFormat):
    """`{"name": …, "parameters": …}`, behind `<|python_tag|>` or not; several calls separated by `;`.

    has_single_calls: whether the template refuses messages with several calls, as Llama 3.1's does.
    """

    name = "llama3_json"
    special_tokens: tuple[str, ...] = (PYTHON_TAG,)
    _arguments = "parameters"
    _separator = "; "

    def __init__(self, vocabulary: Mapping[str, int], knows_tools: bool, has_single_calls: bool) -> None:
        super().__init__(vocabulary, knows_tools)
        self._has_single_calls = has_single_calls

    def parser(self, request: ToolRequest) -> CallStream:
        """Return the parser of one choice."""
        return _Llama3Stream(request, markers=(PYTHON_TAG,), bracket="{")

    def fit_turns(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return the messages with as many calls each as the template accepts."""
        return one_call_a_message(messages) if self._has_single_calls else messages


class _Llama3Stream(CallStream):
    def _after_call(self) -> bool:
        rest = self._text.lstrip()
        if not rest:
            return False
        if rest[0] != ";":
            return self._go(self._read_text)
        length = len(self._text) - len(rest) + 1
        return self._begin_object(length, length)
