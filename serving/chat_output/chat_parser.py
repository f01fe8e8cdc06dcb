"""One choice's text as deltas: reasoning first, then content and tool calls."""

from dispec.serving.chat_output.deltas import ContentDelta, OutputDelta
from dispec.serving.chat_output.reasoning import ReasoningFormat
from dispec.serving.chat_output.tools import ToolCallParser


class ChatParser:
    """Splits the text of one choice.

    reasoning: the markers of the reasoning, if the output has some. starts_in_reasoning: the prompt ends with the first
        marker. tool_calls: reads the text after the reasoning, if tools may be called.
    """

    def __init__(
        self,
        reasoning: ReasoningFormat | None = None,
        starts_in_reasoning: bool = False,
        tool_calls: ToolCallParser | None = None,
    ) -> None:
        self._tool_calls = tool_calls

    def add(self, text: str) -> list[OutputDelta]:
        """Return what the text makes certain."""
        if self._tool_calls is not None:
            return list(self._tool_calls.add(text))
        return [ContentDelta(text)] if text else []

    def finish(self) -> list[OutputDelta]:
        """Return what was held back, at the end of the output."""
        return [] if self._tool_calls is None else list(self._tool_calls.finish())
