"""Turn a list of messages into the prompt that the model was trained on, with the checkpoint's own Jinja template."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Private-use characters, which no message holds; the space shows whether the template trims messages.
_CONTINUED = "\ue000continued here\ue000 "


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; in a prompt the block is only its contents."""

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
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
)
_environment.filters["tojson"] = _tojson
_environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


class ChatTemplate:
    """The template of a checkpoint, or its named templates (`default`, `tool_use`).

    A template is a program by whoever made the checkpoint, so it runs in Jinja's sandbox, on plain data only.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, Any]) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, jinja2.Template] = {}

    @property
    def source(self) -> str | None:
        """The text of the default template."""
        return self._sources.get("default")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt. `add_generation_prompt` opens the assistant's turn; `continue_final_message` leaves the last
        message open instead, for the model to go on with. `variables` are the template's own, like `enable_thinking`.

        Raises ValueError for messages of the wrong form (naming the field) and for what the template refuses.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        plain = plain_messages(messages)
        if continue_final_message:
            plain[-1]["content"] = plain[-1].get("content", "") + _CONTINUED
        template = self._template("tool_use" if tools is not None and "tool_use" in self._sources else "default")
        variables = self._special_tokens | {"documents": None} | variables
        try:
            text = template.render(
                messages=plain,
                tools=None if tools is None else _plain(tools, "tools"),
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        # A template is a program, and fails in all the ways of one.
        except Exception as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        if not continue_final_message:
            return text
        before, mark, after = text.rpartition(_CONTINUED.strip())
        if not mark:
            raise ValueError("continue_final_message: the chat template leaves the last message out")
        return before if after.startswith(" ") else before.rstrip()

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            if name not in self._sources:
                raise ValueError(f"the checkpoint has chat templates {sorted(self._sources)}, but none named {name!r}")
            try:
                self._compiled[name] = _environment.from_string(self._sources[name])
            except jinja2.TemplateError as error:
                raise ValueError(f"the checkpoint's chat template is broken: {error}") from error
        return self._compiled[name]


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Check the messages and bring them into the form that templates for text models expect.

    Content given as text parts becomes one string, tool-call arguments given as JSON text become an object (templates
    write them out as JSON themselves), and fields that are None are dropped (templates test whether they exist).
    """
    if not isinstance(messages, list | tuple):
        raise ValueError(f"messages: must be a list, not {type(messages).__name__}")
    if not messages:
        raise ValueError("messages: must not be empty")
    return [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: must be an object, not {type(message).__name__}")
    plain = {key: value for key, value in _plain(message, where).items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise ValueError(f"{where}.role: {'must be a string' if 'role' in plain else 'is missing'}")
    if "content" in plain:
        plain["content"] = _text(plain["content"], f"{where}.content")
    elif not plain.get("tool_calls"):
        raise ValueError(f"{where}.content: is missing")
    if "reasoning" in plain:  # what OpenAI-style servers call it today, and what templates know
        plain.setdefault("reasoning_content", plain["reasoning"])
    calls = plain.get("tool_calls", [])
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{where}.tool_calls: must be a list")
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise ValueError(f"{where}.tool_calls[{index}]: must be an object with a function")
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except ValueError:
                raise ValueError(f"{where}.tool_calls[{index}].function.arguments: is not JSON") from None
    return plain


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where}: must be a string or a list of parts, not {type(content).__name__}")
    texts = []
    for index, part in enumerate(content):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where}[{index}]: parts of type {kind!r} are not supported by this text model")
        texts.append(text)
    return "\n".join(texts)


def _plain(value: Any, where: str) -> Any:
    """A copy in exact JSON types: objects with methods are a way out of a sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    for exact in (str, int, float):
        if isinstance(value, exact):
            return exact(value)
    raise ValueError(f"{where}: {type(value).__name__} is not JSON data")
