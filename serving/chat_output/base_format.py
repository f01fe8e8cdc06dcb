"""What the formats of tool calls share: tools in the prompt."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from dispec.serving.chat_output.tool_descriptions import as_plain_messages
from dispec.serving.chat_output.tools import ToolRequest


class BaseFormat(ABC):
    """A format whose tools the chat template describes, if `knows_tools`; else they go into the messages.

    vocabulary: the id of each token, for markers that are one token.
    """

    name = ""
    special_tokens: tuple[str, ...] = ()

    def __init__(self, vocabulary: Mapping[str, int], knows_tools: bool) -> None:
        self._vocabulary = vocabulary
        self._knows_tools = knows_tools

    def with_tools(
        self, messages: Sequence[Mapping[str, Any]], request: ToolRequest
    ) -> tuple[Sequence[Mapping[str, Any]], list[dict[str, Any]] | None]:
        """Return messages and `tools` for the chat template. Raises InvalidField for messages of a wrong form."""
        if not self._knows_tools:
            return as_plain_messages(messages, request, self.write_call), None
        return self.fit_turns(messages), [tool.as_template_value() for tool in request.callable_tools] or None

    def fit_turns(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return the messages as a template that knows tools accepts them."""
        return messages

    @abstractmethod
    def write_call(self, name: str, arguments: str) -> str:
        """Return the text of a call in this format. arguments: JSON text."""
