"""From the body of a chat to what the engine and the parsers need: the prompt, parameters, tools and reasoning."""

from dataclasses import dataclass, replace
from typing import Any

from dispec.engine.errors import InvalidField
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from dispec.serving.api.context import ServedModel
from dispec.serving.api.prompts import Prompt
from dispec.serving.api.protocol import ChatRequest
from dispec.serving.api.sampling import sampling_params
from dispec.serving.api.tool_request import read_tools
from dispec.serving.chat_output.call_grammar import with_answer
from dispec.serving.chat_output.chat_parser import ChatParser
from dispec.serving.chat_output.reasoning import ReasoningFormat
from dispec.serving.chat_output.tools import ToolFormat, ToolRequest

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_SWITCHES = ("enable_thinking", "thinking")  # variables of chat templates; the latter is DeepSeek's and Granite's


@dataclass(frozen=True)
class PreparedChat:
    """A checked chat. reasoning: None where the output has none. is_reasoning_open: the prompt ends within it."""

    model: ServedModel
    prompt: Prompt
    params: SamplingParams
    tools: ToolRequest
    reasoning: ReasoningFormat | None
    is_reasoning_open: bool

    @property
    def reasoning_end_token_ids(self) -> tuple[int, ...]:
        """The end marker as tokens."""
        return () if self.reasoning is None else self.reasoning.token_ids(self.model.prompts.tokenizer)[1]

    def parser(self) -> ChatParser:
        """Return the parser of one choice."""
        tool_format = self.model.tool_format
        can_call = tool_format is not None and self.tools.callable_tools
        tool_calls = tool_format.parser(self.tools) if tool_format is not None and can_call else None
        return ChatParser(self.reasoning, self.is_reasoning_open, tool_calls)

    @property
    def kept_token_ids(self) -> frozenset[int]:
        """The special tokens that the parsers read."""
        kept: tuple[str, ...] = () if self.reasoning is None else (self.reasoning.start, self.reasoning.end)
        if self.model.tool_format is not None and self.tools.callable_tools:
            kept += tuple(self.model.tool_format.special_tokens)
        token_id_of = self.model.prompts.tokenizer.backend.token_to_id
        return frozenset(token_id for token in kept if (token_id := token_id_of(token)) is not None)


async def prepare_chat(model: ServedModel, body: ChatRequest) -> PreparedChat:
    """Return a body's chat. Raises InvalidField, ContextOverflow or ApiError."""
    if not body.messages:
        raise InvalidField("messages", "messages is empty: there is nothing to answer")
    tools = _tools(model, body)
    prompt = model.prompts.checked_chat(body, await _prompt(model, body, tools))
    reasoning, is_open = _reasoning(model.reasoning, prompt.text or "", body)
    params = sampling_params(body, model.defaults, len(prompt.token_ids), model.info.max_model_len)
    structure = _structure(model.tool_format, tools, params.structure)
    budget = _reasoning_budget(model, body)
    if reasoning is not None and (structure is not None or budget is not None):
        start, end = reasoning.token_ids(model.prompts.tokenizer)
        before: dict[str, Any] = {"reasoning_start_token_ids": () if is_open else start}
        before |= {"reasoning_end_token_ids": end}
        if budget is not None:
            before |= {"reasoning_max_tokens": budget}
        structure = StructuredOutputs.from_mapping(({} if structure is None else structure.as_mapping()) | before)
    if structure is not params.structure:
        params = replace(params, structured_outputs=structure)
    params = await model.prompts.tokenize_bad_words(params)
    return PreparedChat(model, prompt, params, tools, reasoning, is_open)


async def chat_prompt(model: ServedModel, body: ChatRequest) -> Prompt:
    """Return the prompt that the chat of a body gets, which need not fit the context. Raises as `prepare_chat`."""
    return await _prompt(model, body, _tools(model, body))


def _tools(model: ServedModel, body: ChatRequest) -> ToolRequest:
    """Return the tools of a request. Raises InvalidField for wrong ones, and for a server that reads no calls."""
    tools = read_tools(body)
    if tools.tools and model.tool_format is None:
        why = "the server was started with --tool-call-parser none"
        raise InvalidField("tools", f"tools holds {len(tools.tools)} tools, must be left out: {why}")
    return tools


async def _prompt(model: ServedModel, body: ChatRequest, tools: ToolRequest) -> Prompt:
    variables = reasoning_variables(body, model)
    tool_format = model.tool_format
    with_tools = None if tool_format is None else lambda messages: tool_format.with_tools(messages, tools)
    return await model.prompts.of_chat(body, variables, with_tools)


def reasoning_variables(body: ChatRequest, model: ServedModel) -> dict[str, Any]:
    """Return the template's variables that `reasoning_effort` sets. Raises InvalidField if the template knows none."""
    effort = body.reasoning_effort
    if effort is None:
        return {}
    if effort not in REASONING_EFFORTS:
        must_be = f"must be one of {', '.join(REASONING_EFFORTS)}"
        raise InvalidField("reasoning_effort", f"reasoning_effort is {effort!r:.50}, {must_be}")
    known = model.prompts.tokenizer.template_variables
    variables: dict[str, Any] = {name: False for name in _SWITCHES if name in known and effort == "none"}
    if not variables and "reasoning_effort" in known:
        variables = {"reasoning_effort": effort}
    if not variables and (effort != "none" or model.reasoning is not None):
        raise InvalidField(
            "reasoning_effort",
            f"reasoning_effort is {effort!r}, must be left out: the model's chat template does not know it",
        )
    for name, value in (body.chat_template_kwargs or {}).items():
        if name in variables and variables[name] != value:
            said = f"reasoning_effort is {effort!r} and chat_template_kwargs.{name} is {value!r:.50}: leave one out"
            raise InvalidField("reasoning_effort", said)
    return variables


def _reasoning(known: ReasoningFormat | None, prompt: str, body: ChatRequest) -> tuple[ReasoningFormat | None, bool]:
    """Return the reasoning that the output may have, and whether the prompt ends within it."""
    if known is None:
        return None, False
    content = body.messages[-1].get("content") if body.continue_final_message else ""
    position = known.position(prompt, content if isinstance(content, str) else "")
    return (None, False) if position == "after" else (known, position == "within")


def _structure(
    tool_format: ToolFormat | None, tools: ToolRequest, answer: StructuredOutputs | None
) -> StructuredOutputs | None:
    """Return the grammar of calls and of the answer, which need not follow `answer` where it calls a tool."""
    if tool_format is None or not tools.callable_tools:
        return answer
    if answer is not None and tools.choice == "auto":
        calls = tool_format.structure(replace(tools, choice="required"))
        return None if calls is None else with_answer(calls, answer)
    if answer is not None and not answer.origin.startswith("response_format"):  # the format of content, if any
        raise answer.error("tool_choice demands a call, which leaves no other answer: leave one of them out")
    calls = tool_format.structure(tools)
    return None if calls is None else replace(calls, origin="tools")


def _reasoning_budget(model: ServedModel, body: ChatRequest) -> int | None:
    """Return the most tokens of reasoning. Raises InvalidField for a wrong number and for a model without reasoning."""
    budget = body.thinking_token_budget
    if budget is None or budget == -1:
        return None
    said = f"thinking_token_budget is {budget}"
    if budget < 0:
        raise InvalidField("thinking_token_budget", f"{said}, must be -1 (no limit) or at least 0")
    if model.reasoning is None:
        raise InvalidField("thinking_token_budget", f"{said}, must be left out: the model has no reasoning")
    return budget
