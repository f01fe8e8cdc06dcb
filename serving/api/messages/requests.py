"""From a request in Anthropic's form to a `ChatRequest`. Errors are InvalidField with the place."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from dispec.engine.errors import InvalidField
from dispec.serving.api.messages.conversation import Conversation
from dispec.serving.api.messages.protocol import (
    CountTokensRequest,
    MessagesRequest,
    RequestOutputFormat,
    RequestTool,
)
from dispec.serving.api.protocol import ChatRequest, GenerationRequestFields
from dispec.serving.client.errors import InvalidRequest
from dispec.serving.http.errors import ApiError

_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "xhigh"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING = ("enabled", "adaptive", "disabled")
_DISPLAYS = ("summarized", "omitted")
# Fields of `ChatRequest` at the beginning of an error, and their names in a request in Anthropic's form.
_NAMES = (
    (re.compile(r"^stop\b"), "stop_sequences"),
    (re.compile(r"^reasoning_effort is 'none'"), "thinking.type is 'disabled'"),
    (re.compile(r"^reasoning_effort\b"), "output_config.effort"),
    (re.compile(r"^thinking_token_budget\b"), "thinking.budget_tokens"),
    (re.compile(r"^(tools\[\d+\])\.function\.parameters\b"), r"\1.input_schema"),
    (re.compile(r"^(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"^tool_choice\.function\b"), "tool_choice"),
)
_FORMAT = re.compile(r"^response_format(\.json_schema)?\b")
_PLACE = re.compile(r"\bmessages\[(\d+)\]")


class TranslatedRequest:
    """A request as a `ChatRequest`, and the names of its fields for errors."""

    def __init__(
        self, request: CountTokensRequest, template_variables: Collection[str], has_reasoning: bool = False
    ) -> None:
        """template_variables: of the model's chat template. has_reasoning: whether the model's output may have some.

        Raises InvalidField.
        """
        self._format_name = "output_config.format" if request.output_format is None else "output_format"
        conversation = Conversation(request.system, request.messages)
        self._places = conversation.places
        fields = {name: getattr(request, name) for name in GenerationRequestFields.__struct_fields__}
        self.chat = ChatRequest(
            messages=conversation.messages,
            continue_final_message=conversation.continues,
            allow_special_tokens_in_content=request.allow_special_tokens_in_content,
            tools=None if not request.tools else [_tool(tool, index) for index, tool in enumerate(request.tools)],
            **fields,
        )
        self._set_tool_choice(request)
        self._set_reasoning(request, template_variables)
        self._set_output(request, template_variables)
        if isinstance(request, MessagesRequest):
            if has_reasoning:
                self.chat.thinking_token_budget = _reasoning_budget(request)
            self.chat.max_tokens = request.max_tokens
            self.chat.stop = _all_stops(request)

    @contextmanager
    def own_names(self) -> Iterator[None]:
        """Raise errors about fields of the `ChatRequest` as errors about those of the request."""
        try:
            yield
        except (InvalidField, InvalidRequest) as error:
            message = _PLACE.sub(lambda found: self._place(int(found[1])), str(error))
            for name, own in (*_NAMES, (_FORMAT, self._format_name)):
                message = name.sub(own, message)
            raise ApiError(400, message) from error

    def _place(self, index: int) -> str:
        return self._places[index] if index < len(self._places) else f"messages[{index}]"

    def _set_tool_choice(self, request: CountTokensRequest) -> None:
        choice = request.tool_choice
        if choice is None:
            return
        if choice.type not in (*_CHOICES, "tool"):
            must_be = "must be auto, any, tool or none"
            raise InvalidField("tool_choice", f"tool_choice.type is {choice.type!r:.50}, {must_be}")
        if not request.tools:
            if choice.type != "none":
                raise InvalidField("tool_choice", f"tool_choice is {choice.type!r}, must come with tools")
            return
        if choice.type == "tool":
            if choice.name is None:
                raise InvalidField("tool_choice", "tool_choice.name is missing")
            self.chat.tool_choice = {"type": "function", "function": {"name": choice.name}}
        else:
            self.chat.tool_choice = _CHOICES[choice.type]
        if choice.disable_parallel_tool_use is not None:
            self.chat.parallel_tool_calls = not choice.disable_parallel_tool_use

    def _set_reasoning(self, request: CountTokensRequest, template_variables: Collection[str]) -> None:
        thinking, arguments = request.thinking, dict(request.chat_template_kwargs or {})
        if thinking is not None:
            if thinking.type not in _THINKING:
                must_be = f"must be one of {', '.join(_THINKING)}"
                raise InvalidField("thinking", f"thinking.type is {thinking.type!r:.50}, {must_be}")
            if thinking.display not in (None, *_DISPLAYS):
                must_be = f"must be one of {', '.join(_DISPLAYS)}"
                raise InvalidField("thinking", f"thinking.display is {thinking.display!r:.50}, {must_be}")
            if thinking.budget_tokens is not None and thinking.budget_tokens < 0:
                said = f"thinking.budget_tokens is {thinking.budget_tokens}, must be at least 0"
                raise InvalidField("thinking", said)
            if thinking.type == "disabled":
                self.chat.reasoning_effort = "none"
            else:
                switches = [name for name in ("enable_thinking", "thinking") if name in template_variables]
                arguments = dict.fromkeys(switches, True) | arguments
            if thinking.display == "omitted":
                self.chat.include_reasoning = False
        self.chat.chat_template_kwargs = arguments or None

    def _set_output(self, request: CountTokensRequest, template_variables: Collection[str]) -> None:
        config = request.output_config
        if request.output_format is not None:
            if config is not None and config.format is not None:
                raise InvalidField("output_format", "output_format and output_config.format exclude each other")
            self._set_format(request.output_format)
        if config is None:
            return
        if config.format is not None:
            self._set_format(config.format)
        if config.task_budget is not None:
            raise InvalidField("output_config", "output_config.task_budget is not supported here: leave it out")
        if config.effort not in (None, *_EFFORTS):
            must_be = f"must be one of {', '.join(_EFFORTS)}"
            raise InvalidField("output_config", f"output_config.effort is {config.effort!r:.50}, {must_be}")
        # In Anthropic's API "high" is the default, and so asks for nothing where the template knows no effort.
        is_known = "reasoning_effort" in template_variables
        if config.effort is not None and self.chat.reasoning_effort is None and (is_known or config.effort != "high"):
            self.chat.reasoning_effort = _EFFORTS[config.effort]

    def _set_format(self, given: RequestOutputFormat) -> None:
        name = self._format_name
        if given.type != "json_schema":
            raise InvalidField(name.partition(".")[0], f"{name}.type is {given.type!r:.50}, must be json_schema")
        schema = {"name": "output", "schema": given.schema, "strict": True}
        self.chat.response_format = {"type": "json_schema", "json_schema": schema}


def _tool(tool: RequestTool, index: int) -> dict[str, Any]:
    """Return a tool in OpenAI's form."""
    where = f"tools[{index}]"
    if tool.type not in (None, "custom"):
        said = f"{where}.type is {tool.type!r:.50}, must be custom: Anthropic's own tools are not supported here"
        raise InvalidField("tools", said)
    if tool.name is None or tool.input_schema is None:
        raise InvalidField("tools", f"{where}.{'name' if tool.name is None else 'input_schema'} is missing")
    if tool.defer_loading:
        raise InvalidField("tools", f"{where}.defer_loading is true, must be left out: there is no tool search here")
    if tool.allowed_callers and "direct" not in tool.allowed_callers:
        raise InvalidField("tools", f"{where}.allowed_callers lacks 'direct', the only caller here")
    schema = tool.input_schema
    if tool.input_examples:
        schema = schema | {"examples": tool.input_examples}
    function = {"name": tool.name, "description": tool.description, "parameters": schema, "strict": tool.strict}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _reasoning_budget(request: MessagesRequest) -> int | None:
    """Return the most tokens of reasoning; None where `max_tokens` ends the output before."""
    thinking = request.thinking
    if thinking is None or thinking.type != "enabled" or thinking.budget_tokens is None:
        return None
    return thinking.budget_tokens if thinking.budget_tokens < request.max_tokens - 1 else None


def _all_stops(request: MessagesRequest) -> list[str] | None:
    """Return `stop_sequences` and `stop`, the same field of OpenAI's API."""
    others = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return [*(request.stop_sequences or ()), *others] or None
