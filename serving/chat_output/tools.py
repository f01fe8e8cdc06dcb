"""Tools as a request declares them, and what is asked of each family's format of tool calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from dispec.serving.chat_output.deltas import ToolDelta


class Tool(NamedTuple):
    """A function that the model may call. parameters: the JSON Schema of its arguments.

    is_strict: whether calls that the model chooses to make follow the schema by grammar.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = {"type": "object", "properties": {}}
    is_strict: bool = False

    def as_template_value(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it: in OpenAI's form."""
        described = {"name": self.name, "description": self.description, "parameters": self.parameters}
        function = {name: value for name, value in described.items() if value != ""}
        return {"type": "function", "function": function}


class ToolCall(NamedTuple):
    """A whole call. arguments: JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolRequest:
    """The tools of a request, and which of them the answer calls.

    choice: "auto" leaves it to the model, "none" forbids calls, "required" demands at least one.
    named: the one tool that must be called, where choice is "required".
    is_parallel: whether the answer may have several calls.
    """

    tools: tuple[Tool, ...] = ()
    choice: Literal["auto", "none", "required"] = "auto"
    named: str | None = None
    is_parallel: bool = True

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        if self.choice == "none":
            return ()
        return tuple(tool for tool in self.tools if self.named is None or tool.name == self.named)


class ToolCallParser(Protocol):
    """Reads one choice's text, piece by piece."""

    def add(self, text: str) -> list[ToolDelta]:
        """Return what the text makes certain. A piece that may begin a call is held back."""
        ...

    def finish(self) -> list[ToolDelta]:
        """Return what was held back, at the end of the output."""
        ...


class ToolFormat(Protocol):
    """The form in which a family of models writes tool calls.

    name: for `--tool-call-parser`.
    special_tokens: special tokens that the parser reads, which stay in the text.
    """

    name: str
    special_tokens: tuple[str, ...]

    def parser(self, request: ToolRequest) -> ToolCallParser:
        """Return the parser of one choice."""
        ...

    def structure(self, request: ToolRequest) -> StructuredOutputs | None:
        """Return the grammar of the answer: for required calls, and for tools that are strict; None is free text."""
        ...

    def with_tools(
        self, messages: Sequence[Mapping[str, Any]], request: ToolRequest
    ) -> tuple[Sequence[Mapping[str, Any]], list[dict[str, Any]] | None]:
        """Return messages and `tools` for the chat template. A template without tools gets them in a message."""
        ...
