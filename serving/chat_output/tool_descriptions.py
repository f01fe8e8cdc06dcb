"""Tools, calls and results as plain messages, for chat templates that know none of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dispec.engine.text.chat_messages import plain_messages
from dispec.serving.chat_output.tools import Tool, ToolRequest

WriteCall = Callable[[str, str], str]  # from a name and arguments in JSON to the text of a call


def as_plain_messages(
    messages: Sequence[Mapping[str, Any]], request: ToolRequest, write_call: WriteCall
) -> list[dict[str, Any]]:
    """Return messages of the roles that every template knows.

    Tools are described in the system message, calls become the assistant's text, and results the user's. Results that
    follow one another are one message, with the user's next, because templates demand that roles alternate. Raises
    InvalidField for messages of a wrong form.
    """
    written: list[dict[str, Any]] = []
    names: dict[Any, str] = {}  # of called functions, by the id of the call
    follows_result = False
    for message in plain_messages(messages):
        calls = message.pop("tool_calls", [])
        names |= {call.get("id"): call.get("function", call).get("name", "") for call in calls}
        if calls:
            texts = [message["content"] or "", *(_call_text(call, write_call) for call in calls)]
            message["content"] = "\n".join(text for text in texts if text)
        is_result = message["role"] == "tool"
        if is_result:
            name = names.get(message.get("tool_call_id")) or message.get("name")
            message = {"role": "user", "content": f"Result of {name or 'the call'}:\n{message['content']}"}
        if follows_result and message["role"] == "user":
            written[-1]["content"] += f"\n\n{message['content']}"
        else:
            written.append(message)
            follows_result = is_result
    if request.callable_tools:
        _describe(written, _description(request, write_call))
    return written


def _call_text(call: Mapping[str, Any], write_call: WriteCall) -> str:
    function = call.get("function", call)
    return write_call(str(function.get("name", "")), json.dumps(function.get("arguments", {}), ensure_ascii=False))


def _describe(messages: list[dict[str, Any]], description: str) -> None:
    if messages[0]["role"] in ("system", "developer"):
        messages[0]["content"] = f"{messages[0]['content']}\n\n{description}".lstrip("\n")
    else:
        messages.insert(0, {"role": "system", "content": description})


def _description(request: ToolRequest, write_call: WriteCall) -> str:
    tools = request.callable_tools
    form = write_call("<name>", '{"<argument>": <value>}')
    lines = [
        "You can call these functions, whose arguments are described by JSON Schemas:",
        *(json.dumps(_described(tool), ensure_ascii=False) for tool in tools),
        "",
        "To call a function, answer with its name and its arguments in this form, and with nothing else:",
        form,
    ]
    if request.is_parallel and request.named is None:
        lines.append("You can make several calls, one after the other.")
    if request.named is not None:
        lines.append(f"Now call the function {request.named}.")
    elif request.choice == "required":
        lines.append("Now call a function.")
    else:
        lines.append("If no function is of use, answer as usual. You will be given the results of your calls.")
    return "\n".join(lines)


def _described(tool: Tool) -> dict[str, Any]:
    described = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {name: value for name, value in described.items() if value != ""}
