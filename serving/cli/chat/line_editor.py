"""Reading questions in a terminal: editing of several lines, history, completion of commands."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from dispec.serving.cli.chat.commands import COMMANDS
from dispec.serving.cli.chat.settings import settable
from dispec.serving.cli.console import say

_HISTORY = "DISPEC_HISTORY"
_QUOTES = '"""'


def history_path() -> Path | None:
    """Return the file of the history: `DISPEC_HISTORY`, or none if that is empty, else one in the user's state."""
    chosen = os.environ.get(_HISTORY)
    if chosen is None:
        return Path(platformdirs.user_state_dir("dispec")) / "chat_history"
    return Path(chosen).expanduser() if chosen else None


class LineEditor:
    """Reads questions of one or more lines in a terminal.

    history: the file that keeps what is typed, readable by its owner alone; None for none.
    input, output: the terminal; that of the process by default.
    """

    def __init__(self, history: Path | None, input: Input | None = None, output: Output | None = None) -> None:
        is_command = Condition(lambda: get_app().current_buffer.text.startswith("/"))
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            placeholder=HTML("<ansibrightblack>Ask something, or /help</ansibrightblack>"),
            history=_open_history(history),
            key_bindings=_key_bindings(),
            completer=CommandCompleter(),
            complete_while_typing=is_command,  # else the menu's lines would be kept free below each question
            input=input,
            output=output,
        )

    def read(self) -> str | None:
        """Return the next question or command; None where Ctrl-D, or Ctrl-C twice, ends the conversation."""
        was_interrupted = False
        while True:
            try:
                return _without_quotes(self._session.prompt())
            except EOFError:
                return None
            except KeyboardInterrupt:
                if was_interrupted:
                    return None
                was_interrupted = True
                say("Ctrl-D leaves, as does /exit or another Ctrl-C")


class _QuietFileHistory(FileHistory):
    """A history that goes on in memory alone once its file cannot be written, such as on a full disk."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def _open_history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, mode=0o600))
    except OSError as error:
        said = f"{_HISTORY} names another file, or none if it is empty"
        say(f"warning: the history cannot be kept in {path} ({error.strerror}): {said}")
        return InMemoryHistory()
    return _QuietFileHistory(path)


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()
    in_question = has_focus(DEFAULT_BUFFER)

    @bindings.add("enter", filter=in_question)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif _is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=in_question)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c", filter=in_question)
    @bindings.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.text:
            buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return bindings


class CommandCompleter(Completer):
    """Completes commands, names of sampling parameters and paths."""

    def __init__(self) -> None:
        self._kinds = {name: one.completes for one in COMMANDS for name in (one.name, *one.aliases)}
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """Yield completions of the text before the cursor."""
        command, blank, argument = document.text_before_cursor.partition(" ")
        if not blank:
            if command.startswith("/"):
                yield from _matching(command, {one.name: one.help for one in COMMANDS})
        elif (kind := self._kinds.get(command)) == "parameter":
            yield from _matching(argument, {name: field.option.help for name, field in settable().items()})
        elif kind == "path":
            yield from self._paths.get_completions(Document(argument), event)


def _matching(begun: str, meanings: dict[str, str]) -> Iterable[Completion]:
    for word, meaning in meanings.items():
        if word.startswith(begun):
            yield Completion(word, -len(begun), display_meta=meaning)


def _is_open(text: str) -> bool:
    """Return whether a text begins with three quotes that are not closed."""
    text = text.strip()
    return text.startswith(_QUOTES) and not (text.endswith(_QUOTES) and len(text) >= 2 * len(_QUOTES))


def _without_quotes(text: str) -> str:
    bare = text.strip()
    return bare[len(_QUOTES) : -len(_QUOTES)].strip("\n") if bare.startswith(_QUOTES) and not _is_open(text) else text
