"""The checkpoint's Jinja template, which turns messages into the prompt that the model was trained on."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dispec.engine.errors import InvalidField
from dispec.engine.text.chat_messages import plain_data, plain_messages, with_json_arguments, with_texts

# Private-use characters, which no message has. The space shows whether the template trims messages.
_CONTINUED = "\ue000continued here\ue000 "
_TAGS = range(0xF0000, 0xFFFFE)  # one for each message, to find out whether the template writes it
_WRITTEN_TAG = re.compile(r"[\U000f0000-\U000ffffd]|\\udb[89ab][0-9a-f]\\ud[c-f][0-9a-f]{2}")  # plain or in JSON


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's text for training, as its contents alone."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
)
_environment.filters["tojson"] = _tojson
_environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


class ChatTemplate:
    """The template of a checkpoint, or its named templates (`default`, `tool_use`).

    A template is a foreign program: it runs in Jinja's sandbox, on plain data only.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, Any]) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, jinja2.Template] = {}

    @property
    def source(self) -> str | None:
        """The text of the default template."""
        return self._sources.get("default")

    @property
    def tool_source(self) -> str | None:
        """The text of the template for conversations with tools."""
        return self._sources.get("tool_use", self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Return the prompt.

        `add_generation_prompt` opens the assistant's turn; `continue_final_message` leaves the last message open
        instead. `variables` are the template's own, like `enable_thinking`. Templates that do not know the role
        `developer` get `system`. Raises InvalidField for messages of a wrong form and for messages that the template
        refuses or leaves out, ValueError for a broken template.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidField(
                "continue_final_message", "continue_final_message and add_generation_prompt exclude each other"
            )
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        template = self._template(name)
        variables = self._special_tokens | {"documents": None} | variables
        variables["tools"] = None if tools is None else plain_data(tools, "tools")
        variables["add_generation_prompt"] = add_generation_prompt

        def rendered(messages: Sequence[Mapping[str, Any]]) -> str:
            try:
                return template.render(messages=messages, **variables)
            # A template is a program, and may raise anything.
            except Exception as error:
                raise InvalidField("messages", f"the chat template refuses these messages: {error}") from error

        plain = plain_messages(messages)
        for index, message in enumerate(plain):
            if "tool_calls" in message and "tool_calls" not in self._sources[name]:
                said = f"messages[{index}].tool_calls: the model's chat template does not know them"
                raise InvalidField("messages", said)
        if "developer" not in self._sources[name]:
            plain = [message | {"role": "system"} if message["role"] == "developer" else message for message in plain]
        if any("tool_calls" in message for message in plain):
            plain = _as_expected(plain, rendered)
        if continue_final_message:
            plain[-1]["content"] = (plain[-1]["content"] or "") + _CONTINUED
        text = rendered(plain)
        _check_all_written(plain, messages, rendered)
        if not continue_final_message:
            return text
        before, mark, after = text.rpartition(_CONTINUED.strip())
        if not mark:
            raise InvalidField("messages", "continue_final_message: the chat template leaves the last message out")
        return before if after.startswith(" ") else before.rstrip()

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the templates read and that `render` does not set itself."""
        found: set[str] = set()
        for source in self._sources.values():
            try:
                found |= meta.find_undeclared_variables(_environment.parse(source))
            except jinja2.TemplateError:
                continue  # `render` raises it, if this template is used
        return frozenset(found - {"messages", "tools", "add_generation_prompt"})

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            if name not in self._sources:
                raise ValueError(f"the checkpoint has chat templates {sorted(self._sources)}, but none named {name!r}")
            try:
                self._compiled[name] = _environment.from_string(self._sources[name])
            except jinja2.TemplateError as error:
                raise ValueError(f"the checkpoint's chat template is broken: {error}") from error
        return self._compiled[name]


def _as_expected(messages: list[dict[str, Any]], rendered: Callable[[Any], str]) -> list[dict[str, Any]]:
    """Return messages with tool calls in the form that the template expects.

    Some expect null as the content beside calls, others a text; some objects as arguments, others JSON text. With the
    wrong form a template fails, or writes "None" or an object as Python does. Null comes first, because templates that
    expect it leave calls out beside a text.
    """
    in_json = with_json_arguments(messages)
    forms = (messages, in_json, with_texts(messages), with_texts(in_json))
    calls = [call.get("function", call) for message in messages for call in message.get("tool_calls", ())]
    in_python = {"None", *(repr(call["arguments"]) for call in calls if call.get("arguments"))}
    found = []
    for form in forms:
        try:
            text = rendered(form)
        except InvalidField:
            continue
        found.append((sum(map(text.count, in_python)), form))
    fewest = min((count for count, _ in found), default=0)
    return next((form for count, form in found if count == fewest), forms[2])


def _check_all_written(
    messages: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]], rendered: Callable[[Any], str]
) -> None:
    """Raise InvalidField for a message that the template leaves out, by rendering each with a tag of its own.

    The tag is at both ends of a content, because templates may drop a part of it (such as thinking), and after the
    names of called functions, because templates may drop the content beside them.
    """
    tags = [chr(_TAGS[index % len(_TAGS)]) for index in range(len(messages))]
    try:
        text = rendered([_tagged(message, tag) for message, tag in zip(messages, tags, strict=True)])
    except InvalidField:  # the template checks contents, and has accepted the real ones
        return
    written = set(_WRITTEN_TAG.findall(text))  # one search; one for each tag takes a minute for thousands of messages
    for index, (message, tag) in enumerate(zip(messages, tags, strict=True)):
        has_text = (message["content"] or "").strip() or "tool_calls" in message
        if has_text and written.isdisjoint((tag, json.dumps(tag)[1:-1])):
            what = f"a message of the role {given[index]['role']!r:.50} at this place"
            raise InvalidField("messages", f"messages[{index}]: the model's chat template leaves out {what}")


def _tagged(message: Mapping[str, Any], tag: str) -> dict[str, Any]:
    tagged = dict(message)
    if (message["content"] or "").strip():
        tagged["content"] = f"{tag}{message['content']}{tag}"
    if "tool_calls" in message:
        tagged["tool_calls"] = [_tagged_call(call, tag) for call in message["tool_calls"]]
    return tagged


def _tagged_call(call: Mapping[str, Any], tag: str) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _tagged_call(call["function"], tag)}
    return {**call, "name": f"{call.get('name', '')}{tag}"}
