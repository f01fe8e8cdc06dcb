"""Tool calls of Hermes, Qwen2.5 and Qwen3: an object between tags."""

from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from dispec.serving.chat_output.base_format import BaseFormat
from dispec.serving.chat_output.call_grammar import CallRules, arguments_rule, calls_grammar, literal
from dispec.serving.chat_output.call_stream import CallStream
from dispec.serving.chat_output.tools import Tool, ToolRequest

_BEGIN, _END = "<tool_call>", "</tool_call>"


class HermesFormat(BaseFormat):
    """`<tool_call>`, newline, `{"name": …, "arguments": …}`, newline, `</tool_call>`."""

    name = "hermes"
    special_tokens: tuple[str, ...] = (_BEGIN, _END)  # plain added tokens in Qwen's vocabulary

    def parser(self, request: ToolRequest) -> CallStream:
        """Return the parser of one choice."""
        return _HermesStream(request, markers=(_BEGIN,))

    def structure(self, request: ToolRequest) -> StructuredOutputs | None:
        """Return the grammar of the answer; None is free text."""
        begin_id = self._vocabulary.get(_BEGIN)
        rules = [self._rules(tool) for tool in request.callable_tools]
        return calls_grammar(request, rules, not_in_text=_BEGIN, marker_id=begin_id)

    def write_call(self, name: str, arguments: str) -> str:
        """Return the text of a call."""
        return f'{_BEGIN}\n{{"name": "{name}", "arguments": {arguments}}}\n{_END}'

    def _rules(self, tool: Tool) -> CallRules:
        begin, end = self._tag(_BEGIN), self._tag(_END)
        head, tail, newline = literal(f'\n{{"name": "{tool.name}", "arguments": '), literal("}\n"), literal("\n")
        call = f"{head} {arguments_rule(tool)} {tail} {end}"
        return CallRules(_BEGIN, call, f"{newline} {begin} {call}")

    def _tag(self, tag: str) -> str:
        token = self._vocabulary.get(tag)
        return literal(tag) if token is None else f"<[{token}]>"


class _HermesStream(CallStream):
    def _after_call(self) -> bool:
        return self._skip(_END)
