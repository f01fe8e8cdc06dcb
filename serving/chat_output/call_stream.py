"""What the parsers of tool calls share: the text around calls, and calls that are JSON objects."""

import json
import re
import secrets
import string
from collections.abc import Callable, Sequence

from dispec.serving.chat_output.deltas import ContentDelta, ToolCallArguments, ToolCallStart, ToolDelta
from dispec.serving.chat_output.json_text import JsonText
from dispec.serving.chat_output.tools import ToolRequest

_ALPHANUMERIC = string.ascii_letters + string.digits
_MAX_NAME = 64  # characters
# The usual order, in which arguments are streamed. Models write either key for them.
_NAME = re.compile(rf'\s*\{{\s*"name"\s*:\s*"([^"\\]{{0,{_MAX_NAME}}})"')
_HEAD = re.compile(_NAME.pattern + r'\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_FIRST_KEY = re.compile(r'\s*\{\s*"([^"]*)"')
_BEFORE_KEY = re.compile(r'\s*(?:\{\s*(?:"\w*)?)?')
_KEYS = frozenset({"name", "arguments", "parameters", "type", "id", "function"})  # that a call may begin with


class CallStream:
    """Reads one choice's text. A format implements `_begin_call`, and `_after_call` if something ends its calls.

    markers: texts that begin calls.
    bracket: a character that begins calls, as a part of them, at the beginning of a line or behind a call.
    White space around a call is not content. Text that turns out not to be a call is.
    """

    def __init__(
        self,
        request: ToolRequest,
        markers: Sequence[str] = (),
        bracket: str = "",
        new_id: Callable[[], str] = lambda: f"call_{random_id(24)}",
    ) -> None:
        self._names = frozenset(tool.name for tool in request.callable_tools)
        self._markers = tuple(markers)
        self._bracket = bracket
        self._new_id = new_id
        self._beginning = re.compile("|".join(map(re.escape, (*markers, *bracket))))
        self._text = ""  # not consumed yet
        self._call = 0  # where the call that is read begins in the text
        self._no_call = 0  # the end of what becomes content if it is not a call
        self._scanned = 0  # the end of what `_json` has seen of a call that is read as a whole
        self._json = JsonText()
        self._is_final = False
        self._is_line_start = True
        self._num_calls = 0
        self._deltas: list[ToolDelta] = []
        self._step: Callable[[], bool] = self._read_text
        self._after_arguments: Callable[[], bool] = self._read_end_of_object

    def add(self, text: str) -> list[ToolDelta]:
        """Return what the text makes certain. A piece that may begin a call is held back."""
        self._text += text
        return self._run()

    def finish(self) -> list[ToolDelta]:
        """Return what was held back, at the end of the output."""
        self._is_final = True
        return self._run()

    # Steps return whether another step can follow; if not, they wait for more text.

    def _begin_call(self) -> bool:
        """Read what follows a marker or begins with the bracket."""
        return self._begin_object(self._call, self._no_call)

    def _after_call(self) -> bool:
        """Read what ends a call or separates it from the next."""
        return self._go(self._read_text)

    def _run(self) -> list[ToolDelta]:
        while self._step():
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def _go(self, step: Callable[[], bool]) -> bool:
        self._step = step
        return True

    # Text around calls

    def _read_text(self) -> bool:
        for found in self._beginning.finditer(self._text):
            before = self._text[: found.start()]
            if found[0] == self._bracket and not self._begins_line(before):
                continue
            num_written = len(before.rstrip())
            self._write(num_written)
            is_bracket = found[0] == self._bracket
            self._no_call = found.end() - num_written
            self._call = self._no_call - is_bracket
            return self._go(self._begin_call)
        if not self._is_final:
            certain = self._text[: len(self._text) - self._num_held_back()]
            self._write(len(certain.rstrip()))
        elif self._num_calls == 0 or self._text.strip():
            self._write(len(self._text))
        return False

    def _begins_line(self, before: str) -> bool:
        line = before.rstrip(" \t")
        return line.endswith("\n") or (line == "" and self._is_line_start)

    def _num_held_back(self) -> int:
        """Return the length of the longest end of the text that may begin a marker."""
        ends = (self._text[-length:] for length in range(max(map(len, self._markers), default=0), 0, -1))
        return next((len(end) for end in ends if any(marker.startswith(end) for marker in self._markers)), 0)

    def _write(self, length: int) -> None:
        """Consume the beginning of the text as content."""
        if length:
            self._deltas.append(ContentDelta(self._text[:length]))
            self._text = self._text[length:]
            self._is_line_start = False

    def _give_up(self, end: int | None = None) -> bool:
        """Read on behind the beginning of what is not a call, or behind `end`.

        What was scanned in vain is not read again: that would take time in the square of its length.
        """
        self._write(self._no_call if end is None else end)
        return self._go(self._read_text)

    # Calls

    def _start_call(self, name: str, end: int) -> None:
        """Begin a call, whose arguments begin at `end`."""
        self._deltas.append(ToolCallStart(self._num_calls, self._new_id(), name))
        self._num_calls += 1
        self._text = self._text[end:]
        self._is_line_start = True

    def _stream_arguments(self, after: Callable[[], bool]) -> bool:
        self._json = JsonText()
        self._after_arguments = after
        return self._go(self._read_arguments)

    def _read_arguments(self) -> bool:
        written, end = self._json.add(self._text)
        if written:
            self._deltas.append(ToolCallArguments(self._num_calls - 1, written))
        self._text = self._text[end:]
        return self._json.is_complete and self._go(self._after_arguments)

    def _add_whole_call(self, name: str, arguments: str, end: int) -> None:
        self._start_call(name, end)
        self._deltas.append(ToolCallArguments(self._num_calls - 1, arguments))

    def _skip(self, ending: str) -> bool:
        """Consume the text that ends a call, with white space before it, if it is there."""
        rest = self._text.lstrip()
        if rest.startswith(ending):
            self._text = rest[len(ending) :]
        elif ending.startswith(rest) and not self._is_final:
            return False
        return self._go(self._read_text)

    # A call as an object: {"name": …, "arguments": {…}}

    def _begin_object(self, start: int, no_call: int) -> bool:
        self._call = self._scanned = start
        self._no_call = no_call
        self._json = JsonText()
        return self._go(self._read_object)

    def _read_object(self) -> bool:
        head = _HEAD.match(self._text, self._call)
        if head is not None and head[1] in self._names:
            self._start_call(head[1], head.end())
            return self._stream_arguments(self._read_end_of_object)
        if not self._may_be_call():
            return self._give_up()
        self._scanned = self._json.add(self._text, self._scanned)[1]
        if self._json.is_complete:
            call = _read_call(self._text[self._call : self._scanned])
            if call is None or call[0] not in self._names:
                return self._give_up(self._scanned)
            self._add_whole_call(*call, self._scanned)
            return self._go(self._after_call)
        return self._is_final and self._give_up(self._scanned)

    def _may_be_call(self) -> bool:
        key = _FIRST_KEY.match(self._text, self._call)
        if key is None:
            return _BEFORE_KEY.fullmatch(self._text, self._call) is not None
        name = _NAME.match(self._text, self._call)
        return key[1] in _KEYS and (name is None or name[1] in self._names)

    def _read_end_of_object(self) -> bool:
        rest = self._text.lstrip()
        if not rest:
            return False
        if rest[0] == ",":  # other members
            self._json = JsonText(depth=1)
            return self._go(self._skip_members)
        self._text = rest.removeprefix("}")  # which models forget behind nested arguments
        return self._go(self._after_call)

    def _skip_members(self) -> bool:
        self._text = self._text[self._json.add(self._text)[1] :]
        return self._json.is_complete and self._go(self._after_call)


def random_id(length: int) -> str:
    """Return random letters and digits."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(length))


def _read_call(text: str) -> tuple[str, str] | None:
    """Return the name and the arguments, as JSON text, of a call in another form than usual; None if it is no call."""
    try:
        found = json.loads(text)
        if isinstance(found.get("function"), dict):
            found = found["function"]
        arguments = found.get("arguments", found.get("parameters"))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        written = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
        written.encode()  # half a surrogate pair is an error
    except (ValueError, RecursionError):
        return None
    name = found.get("name")
    return (name, written) if isinstance(name, str) and written.startswith("{") else None
