"""Reading questions in a terminal: keys, several lines, history, completion."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from dispec.serving.cli.chat.commands import COMMANDS
from dispec.serving.cli.chat.line_editor import CommandCompleter, LineEditor, history_path
from dispec.serving.cli.chat.settings import settable

ENTER, ALT_ENTER, CTRL_C, CTRL_D, UP, LEFT = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A", "\x1b[D"
PASTE = "\x1b[200~{}\x1b[201~"


@contextmanager
def editor(history: Path | None = None) -> Iterator[Callable[[str], str | None]]:
    """Yield a function that types keys and returns what is read."""
    with create_pipe_input() as typed:
        lines = LineEditor(history, typed, DummyOutput())

        def read(keys: str) -> str | None:
            typed.send_text(keys)
            return lines.read()

        yield read


def read_all(*keys: str, history: Path | None = None) -> list[str | None]:
    """Return what is read for the keys of each prompt. The history is loaded before keys that come after it began."""
    with editor(history) as read:
        return [read(one) for one in keys]


@pytest.mark.parametrize(
    ("keys", "question"),
    [
        (f"one{ALT_ENTER}two{ENTER}", "one\ntwo"),
        (f"one\\{ENTER}two{ENTER}", "one\ntwo"),
        (f"one\\{LEFT}{ENTER}", "one\\"),
        (f'"""one{ENTER}two"""{ENTER}', "one\ntwo"),
        (f'"""{ENTER}one{ENTER}{ENTER}two{ENTER}"""{ENTER}', "one\n\ntwo"),
        (f'"""one"""{ENTER}', "one"),
        (f'say """one"""{ENTER}', 'say """one"""'),
        (f"{PASTE.format('one' + ENTER + 'two')}{ENTER}", "one\ntwo"),
        (f"one{CTRL_C}two{ENTER}", "two"),
        (f"one{ALT_ENTER}two{CTRL_C}three{ENTER}", "three"),
        (ENTER, ""),
        (f"{CTRL_C}one{ENTER}", "one"),
        (CTRL_D, None),
        (CTRL_C * 2, None),
        (f"one{CTRL_C * 3}", None),
    ],
)
def test_keys(keys: str, question: str | None) -> None:
    assert read_all(keys) == [question]


def test_only_two_ctrl_c_in_a_row_leave(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_all(f"{CTRL_C}one{ENTER}", f"{CTRL_C}two{ENTER}") == ["one", "two"]
    assert capsys.readouterr().err == "Ctrl-D leaves, as does /exit or another Ctrl-C\n" * 2


def test_the_history_is_kept_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    mask = os.umask(0)
    try:
        assert read_all(f"one{ENTER}", f"two{ALT_ENTER}lines{ENTER}", history=path) == ["one", "two\nlines"]
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_all(f"{UP}{ENTER}", f"{UP * 3}{ENTER}", history=path) == ["two\nlines", "one"]


def test_a_history_without_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_all(f"one{ENTER}", f"{UP}{ENTER}") == ["one", "one"]
    assert capsys.readouterr().err == ""
    assert read_all(f"one{ENTER}", f"{UP}{ENTER}", history=tmp_path) == ["one", "one"]  # a directory
    assert capsys.readouterr().err.startswith(f"warning: the history cannot be kept in {tmp_path} (Is a directory): ")


def test_a_history_that_can_no_longer_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "history"
    with editor(path) as read:
        assert read(f"one{ENTER}") == "one"
        path.unlink()
        path.mkdir()
        assert read(f"two{ENTER}") == "two"
        assert read(f"{UP}{ENTER}") == "two"
    assert capfd.readouterr() == ("", "")


def test_the_place_of_the_history(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DISPEC_HISTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "dispec" / "chat_history"
    monkeypatch.setenv("DISPEC_HISTORY", "~/lines")
    assert history_path() == Path.home() / "lines"
    monkeypatch.setenv("DISPEC_HISTORY", "")
    assert history_path() is None


def completions(text: str) -> list[str]:
    document = Document(text)
    found = CommandCompleter().get_completions(document, CompleteEvent())
    return [text[: len(text) + one.start_position] + one.text for one in found]


def test_commands_and_their_arguments_are_completed(tmp_path: Path) -> None:
    assert completions("/") == [command.name for command in COMMANDS]
    assert completions("/s") == ["/system", "/set", "/save", "/stats"]
    assert completions("/set ") == [f"/set {name}" for name in settable()]
    assert completions("/set top") == ["/set top_k", "/set top_p"]
    (tmp_path / "talk.json").touch()
    assert completions(f"/load {tmp_path}/ta") == [f"/load {tmp_path}/talk.json"]
    for text in ("", "What", "/unknown x", "/help x", "a /s"):
        assert completions(text) == []
