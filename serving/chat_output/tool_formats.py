"""Chooses the format of tool calls by the model's chat template."""

import re
from collections.abc import Mapping
from typing import Literal, get_args

from dispec.serving.chat_output.hermes import HermesFormat
from dispec.serving.chat_output.json_calls import JsonFormat, Llama3JsonFormat
from dispec.serving.chat_output.mistral import MistralFormat
from dispec.serving.chat_output.pythonic import PythonicFormat
from dispec.serving.chat_output.tools import ToolFormat

ToolCallParserName = Literal["auto", "none", "hermes", "json", "llama3_json", "mistral", "pythonic"]

_TOOLS = re.compile(r"\btools\b")
_PYTHON_CALL = re.compile(r"\[\s*\w+\(\w+\s*=")  # the form of calls, as templates explain it


def choose_tool_format(
    name: ToolCallParserName, chat_template: str | None, vocabulary: Mapping[str, int]
) -> ToolFormat | None:
    """Return the format of a name; None for none, and for a model without a chat template.

    chat_template: the source of the template for conversations with tools, by which auto chooses. A template that
        shows no known format gets the generic form, json.
    vocabulary: the id of each token.
    Raises ValueError for an unknown name.
    """
    if name not in get_args(ToolCallParserName):
        raise ValueError(f"{name!r} is no tool call parser, must be one of {', '.join(get_args(ToolCallParserName))}")
    if name == "none" or chat_template is None:
        return None
    knows_tools = _TOOLS.search(chat_template) is not None
    if name == "auto":
        name = _detect(chat_template) if knows_tools else "json"
    if name == "hermes":
        return HermesFormat(vocabulary, knows_tools)
    if name == "mistral":
        return MistralFormat(vocabulary, knows_tools, is_by_name="[ARGS]" in chat_template)
    if name == "llama3_json":
        has_single_calls = "single tool-call" in chat_template  # in the error that it raises
        return Llama3JsonFormat(vocabulary, knows_tools, has_single_calls)
    if name == "pythonic":
        return PythonicFormat(vocabulary, knows_tools)
    return JsonFormat(vocabulary, knows_tools=False)  # a template with tools describes another form


def _detect(chat_template: str) -> ToolCallParserName:
    if "[TOOL_CALLS]" in chat_template:
        return "mistral"
    # Others write their arguments between tags of their own.
    if "<tool_call>" in chat_template and "<function=" not in chat_template and "<arg_key>" not in chat_template:
        return "hermes"
    if _PYTHON_CALL.search(chat_template):
        return "pythonic"
    if '"parameters": ' in chat_template and ("ipython" in chat_template or "<|python_tag|>" in chat_template):
        return "llama3_json"
    return "json"
