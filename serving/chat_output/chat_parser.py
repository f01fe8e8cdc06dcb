"""One choice's text as deltas: reasoning first, then content and tool calls."""

from dispec.serving.chat_output.deltas import ContentDelta, OutputDelta, ReasoningDelta
from dispec.serving.chat_output.reasoning import ReasoningFormat, ReasoningParser
from dispec.serving.chat_output.tools import ToolCallParser


class ChatParser:
    """Splits the text of one choice.

    reasoning: the markers of the reasoning, if the output may have some. starts_in_reasoning: the prompt ends within
        the reasoning. tool_calls: reads the text after the reasoning, if tools may be called.
    """

    def __init__(
        self,
        reasoning: ReasoningFormat | None = None,
        starts_in_reasoning: bool = False,
        tool_calls: ToolCallParser | None = None,
    ) -> None:
        self._reasoning = None if reasoning is None else ReasoningParser(reasoning, starts_in_reasoning)
        self._tool_calls = tool_calls

    @property
    def may_be_reasoning(self) -> bool:
        """Whether the text so far holds no answer, and the next text may be reasoning."""
        return self._reasoning is not None and not self._reasoning.has_ended

    @property
    def has_reasoning(self) -> bool:
        """Whether the text so far is known to have reasoning."""
        return self._reasoning is not None and self._reasoning.has_reasoning

    def add(self, text: str) -> list[OutputDelta]:
        """Return what the text makes certain."""
        if self._reasoning is None:
            return self._answer(text)
        reasoning, answer = self._reasoning.add(text)
        return [*_reasoning(reasoning), *self._answer(answer)]

    def finish(self) -> list[OutputDelta]:
        """Return what was held back, at the end of the output."""
        deltas: list[OutputDelta] = []
        if self._reasoning is not None:
            reasoning, answer = self._reasoning.finish()
            deltas += [*_reasoning(reasoning), *self._answer(answer)]
        if self._tool_calls is not None:
            deltas += self._tool_calls.finish()
        return deltas

    def _answer(self, text: str) -> list[OutputDelta]:
        if not text:
            return []
        return [ContentDelta(text)] if self._tool_calls is None else list(self._tool_calls.add(text))


def _reasoning(text: str) -> list[OutputDelta]:
    return [ReasoningDelta(text)] if text else []
