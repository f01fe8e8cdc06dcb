"""The commands of a conversation, such as /help: lines of a slash and a word, with the rest of the line as argument."""

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from dispec.serving.cli.chat.conversation import read_conversation, write_conversation
from dispec.serving.cli.chat.session import ChatSession
from dispec.serving.cli.chat.settings import setting_line, setting_lines, with_setting
from dispec.serving.cli.console import say

_COMMAND = re.compile(r"(/[a-z?]+)(?:\s+(.*))?", re.DOTALL)  # a path has more slashes


class ChatCommand(NamedTuple):
    """A command. argument: its name in the help, empty without one. completes: what Tab offers for the argument."""

    name: str
    argument: str
    help: str
    run: Callable[[ChatSession, str], None]
    aliases: tuple[str, ...] = ()
    completes: Literal["parameter", "path"] | None = None


def run_command(session: ChatSession, line: str) -> bool:
    """Run the command in a line; return False if the line is a question.

    Raises ValueError for an unknown command or a wrong argument, and OSError for a file.
    """
    match = _COMMAND.fullmatch(line.rstrip())
    if match is None:
        return False
    name, argument = match[1], (match[2] or "").strip()
    command = _BY_NAME.get(name)
    if command is None:
        likely = difflib.get_close_matches(name, _BY_NAME, 1)
        hint = f"did you mean {likely[0]}?" if likely else "/help lists them, and a space before it makes it a question"
        raise ValueError(f"unknown command {name}: {hint}")
    if argument and not command.argument:
        raise ValueError(f"{name} takes no argument")
    command.run(session, argument)
    return True


def _help(session: ChatSession, argument: str) -> None:
    rows = [(f"{', '.join((one.name, *one.aliases))} {one.argument}".rstrip(), one.help) for one in COMMANDS]
    width = max(len(form) for form, _ in rows)
    for form, meaning in (*rows, *_KEYS):
        say(f"  {form:<{width}}  {meaning}")


def _clear(session: ChatSession, argument: str) -> None:
    session.turns = []
    say("forgotten")


def _system(session: ChatSession, argument: str) -> None:
    if argument:
        session.system = None if argument == '""' else argument
    say("no system message" if session.system is None else f"system message: {session.system}")


def _set(session: ChatSession, argument: str) -> None:
    name, *values = re.split(r"\s*=\s*|\s+", argument, maxsplit=1)
    if not name:
        for line in setting_lines(session.params):
            say(line)
        return
    if values:
        session.params = with_setting(session.params, name, values[0], session.default_params)
    say(setting_line(session.params, name))


def _retry(session: ChatSession, argument: str) -> None:
    session.retry()


def _undo(session: ChatSession, argument: str) -> None:
    question = session.last_turn().question
    session.turns = session.turns[:-1]
    say(f"forgotten: {question if len(question) <= 60 else f'{question[:60]}…'}")


def _save(session: ChatSession, argument: str) -> None:
    path = _path(argument)
    if path.exists() and path != session.file:
        raise ValueError(f"{path} exists already: give another name")
    write_conversation(path, session.turns, session.system)
    session.file = path
    say(f"saved {_num_turns(session)} to {path}")


def _load(session: ChatSession, argument: str) -> None:
    path = _path(argument)
    session.turns, session.system = read_conversation(path)
    session.file = path
    say(f"loaded {_num_turns(session)} from {path}")


def _stats(session: ChatSession, argument: str) -> None:
    for line in session.statistics.lines(session.max_model_len):
        say(f"  {line}")


def _exit(session: ChatSession, argument: str) -> None:
    session.is_over = True


def _path(argument: str) -> Path:
    if not argument:
        raise ValueError("the name of a file is missing")
    return Path(argument).expanduser()


def _num_turns(session: ChatSession) -> str:
    count = len(session.turns)
    return f"{count} question{'' if count == 1 else 's'}"


COMMANDS = (
    ChatCommand("/help", "", "List the commands.", _help, ("/?",)),
    ChatCommand("/clear", "", "Forget the conversation, but not the system message.", _clear),
    ChatCommand("/system", "TEXT", 'Set the system message, "" for none; without TEXT show it.', _system),
    ChatCommand(
        *("/set", "NAME VALUE", "Set a sampling parameter, also back to default; without VALUE or NAME show them."),
        *(_set, (), "parameter"),
    ),
    ChatCommand("/retry", "", "Answer the last question anew.", _retry),
    ChatCommand("/undo", "", "Forget the last question and its answer.", _undo),
    ChatCommand("/save", "FILE", "Write the conversation as a JSON list of messages.", _save, (), "path"),
    ChatCommand("/load", "FILE", "Continue such a conversation.", _load, (), "path"),
    ChatCommand("/stats", "", "Show the speed and the use of the context.", _stats),
    ChatCommand("/exit", "", "Leave, as Ctrl-D does.", _exit, ("/bye", "/quit")),
)
_KEYS = (
    ("Alt-Enter", 'Begin a new line, as Enter does after \\ or within """.'),
    ("Ctrl-C", "Stop the answer, or clear the line."),
)
_BY_NAME = {name: command for command in COMMANDS for name in (command.name, *command.aliases)}
