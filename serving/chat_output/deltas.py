"""The pieces of a chat's output, in order, as the routes send them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text of the model's reasoning, without its markers."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool call begins. index: of the call in its choice, from 0. id: unique in the conversation."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next characters of a call's arguments. Joined, those of a call are a JSON object, unless the output ends
    within them or the model does not write JSON.
    """

    index: int
    text: str


OutputDelta = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments
ToolDelta = ContentDelta | ToolCallStart | ToolCallArguments
