"""The loop of a conversation, and what it says at the start."""

import sys
from collections.abc import Callable, Iterator

from dispec.serving.cli.chat.commands import run_command
from dispec.serving.cli.chat.session import ChatSession
from dispec.serving.cli.chat.settings import changed_settings
from dispec.serving.cli.chat.terminal import is_terminal
from dispec.serving.cli.console import explain, parameter_count, say

Reader = Callable[[], str | None]


def converse(session: ChatSession, read: Reader) -> None:
    """Answer questions and run commands until the input or the session ends. Wrong input is reported, and it goes on.

    read: returns the next question or command, None at the end.
    """
    while not session.is_over and (line := read()) is not None:
        try:
            if not run_command(session, line) and (question := line.strip()):
                session.ask(question)
        except (ValueError, OSError) as error:  # such as a question that is too long
            say(f"error: {explain(error)[0]}")


def open_reader(keeps_history: bool) -> Reader:
    """Return a reader of standard input: an editor in a terminal, else a question a line."""
    if not is_terminal():
        return lambda: sys.stdin.readline() or None
    from dispec.serving.cli.chat.line_editor import LineEditor, history_path

    return LineEditor(history_path() if keeps_history else None).read


def banner(session: ChatSession) -> Iterator[str]:
    """Yield lines on the model, its settings and the keys."""
    engine = session.llm.engine
    count = parameter_count(engine.config.num_parameters)
    seconds = sum(engine.phase_seconds.values())
    yield f"{engine.options.model} on {engine.device}: {count} parameters in {engine.weights_format}"
    yield f"loaded in {seconds:.1f} s; context {session.max_model_len} tokens; {changed_settings(session.params)}"
    yield "/help lists commands, Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D leaves"
