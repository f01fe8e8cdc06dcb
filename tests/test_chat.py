"""`dispec chat`: its memory of a conversation, and the ways to end it."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dispec.__main__ import main
from dispec.serving.cli import commands
from dispec.serving.cli.chat.conversation import Turn, fit
from dispec.serving.cli.chat.converse import converse, open_reader
from dispec.serving.cli.console import printable
from tests.chat_models import ScriptedModel, chat_session
from tests.checkpoints import save_tiny
from tests.commands import dispec, eager, one_sentence, read_until, running


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, "qwen3")
    return str(directory)


def test_a_conversation_remembers_stops_and_forgets() -> None:
    with running(
        ["chat", "--enforce-eager", "--max-tokens", "48", "--temperature", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
    ) as process:
        assert process.stdin is not None

        def ask(question: str, until: str = " tokens/s") -> str:
            assert process.stdin is not None
            process.stdin.write(f"{question}\n".encode())
            return read_until(process.stdout, until)

        read_until(process.stdout, "kv cache")
        ask("My name is Zork.")
        assert "Zork" in ask("What is my name?")
        read_until(process.stdout, "\n")
        ask("Tell me a very long story about a dragon.", until=" ")
        process.send_signal(signal.SIGINT)
        read_until(process.stdout, "\nstopped\n")
        assert "Zork" in ask("What is my name?")
        ask("/nonsense", until="unknown command /nonsense")
        ask("/clear", until="forgotten\n")
        assert "Zork" not in ask("What is my name?")
        out, _ = process.communicate(b"/exit\n")
    assert process.returncode == 0
    assert "Traceback" not in out.decode()


def test_a_conversation_outgrows_the_context(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = ["Who is there?"] * 4 + ["word " * 200, "Who is there?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions)))
    result = dispec("chat", *eager(tiny, "--max-model-len", "96", "--max-tokens", "20"))
    assert result.code == 0
    assert "the conversation no longer fits 96 tokens" in result.err
    assert result.err.count("error: prompt has") == 1
    assert result.err.count("first token after") == 5


def test_the_oldest_turns_go_first(capsys: pytest.CaptureFixture[str]) -> None:
    def tokenize(messages: list[dict[str, str]]) -> list[int]:
        return [0] * sum(len(message["content"]) for message in messages)

    turns = [Turn("a" * 10, "b" * 10), Turn("c" * 10, "d" * 10), Turn("e" * 10, "f" * 10)]
    prompt, kept = fit(turns, "q" * 10, "s" * 10, tokenize, max_model_len=80, max_tokens=20)
    assert kept == turns[1:]
    assert len(prompt) == 60
    assert "its oldest turn is forgotten" in capsys.readouterr().err
    assert fit(turns, "q", None, tokenize, max_model_len=80, max_tokens=19)[1] == turns
    assert capsys.readouterr().err == ""
    assert fit(turns, "q" * 79, None, tokenize, max_model_len=80, max_tokens=20) == ([0] * 79, [])
    assert "3 oldest turns are forgotten" in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [False, True])
def test_reasoning_is_dimmed_and_forgotten(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where?\nWhere again?\n"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    session = chat_session(*["<think>\nHm.\n</think>\n\nIt is Paris."] * 2)
    converse(session, open_reader(keeps_history=False))
    shown = capsys.readouterr().out
    dimmed = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", shown))
    assert dimmed == ("Hm." * 2 if is_terminal else "")
    assert re.sub(r"\x1b\[2m.*?\x1b\[0m", "", shown).replace("\n\n", "") == "It is Paris.\n" * 2
    model: Any = session.llm
    assert "It is Paris." in model.prompts[1]
    assert "Hm." not in model.prompts[1]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_terminal_gets_no_control_characters(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    assert printable("a\tb\nc é😀") == "a\tb\nc é😀"
    session = chat_session("A\x1b]52;c;eA==\x07B\x9b1mC\r\n")
    session.ask("Where?")
    shown = "A]52;c;eA==B1mC\n" if is_terminal else "A\x1b]52;c;eA==\x07B\x9b1mC\r\n"
    assert capsys.readouterr().out == shown
    monkeypatch.setattr(commands, "load_model", lambda *_: ScriptedModel("A\x1b]52;c;eA==\x07B\x9b1mC\r\n"))
    with contextlib.suppress(SystemExit):
        main(["generate", "Where?", "-q"])
    assert capsys.readouterr().out == shown


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "no chat template" in one_sentence(dispec("chat", *eager(str(tmp_path))))
    assert dispec("generate", "hello", *eager(str(tmp_path), "--max-tokens", "2")).code == 0


def test_run_answers_one_prompt(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--enforce-eager", "--kv-cache-memory", "4MiB", "--max-tokens", "8", "--ignore-eos", "--seed", "1"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    result = dispec("run", tiny, "hello", *options)
    assert result.code == 0
    assert result.out.strip()
    assert result.err.splitlines()[-1].startswith("8 tokens, ")
    assert dispec("chat", tiny, "-", *options, "-q") == (0, result.out, "")
    refused = dispec("run", tiny, "word " * 200, "--max-model-len", "96", *options)
    assert refused.code == 2
    assert "prompt has" in one_sentence(refused)


def test_run_samples_as_the_model_recommends(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    options = [*("--enforce-eager", "--kv-cache-memory", "4MiB", "--max-tokens", "12", "--ignore-eos", "-q", "--seed")]
    (tmp_path / "generation_config.json").write_text('{"temperature": 5.0}')
    varied = [dispec("run", str(tmp_path), "hello", *options, seed).out for seed in ("1", "2")]
    assert varied[0] != varied[1]
    chosen = [dispec("run", str(tmp_path), "hello", "--temperature", "0", *options, seed).out for seed in ("1", "2")]
    assert chosen[0] == chosen[1]
    (tmp_path / "generation_config.json").write_text('{"temperature": 5.0, "top_k": 1}')
    assert dispec("run", str(tmp_path), "hello", *options, "1").out == chosen[0]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_conversation_in_a_terminal(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pty

    monkeypatch.setenv("DISPEC_HISTORY", str(tmp_path / "history"))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")  # this terminal does not tell where its cursor is
    leader, follower = pty.openpty()
    terminal = {"stdin": follower, "stdout": follower, "stderr": follower}
    args = ["chat", *eager(tiny, "--max-tokens", "4", "--ignore-eos")]
    with os.fdopen(leader, "rb", buffering=0) as screen, running(args, **terminal) as process:
        os.close(follower)
        start = read_until(screen, "> ")
        assert " parameters in bfloat16" in start
        assert "  kv cache " not in start  # the log of the start is for scripts
        os.write(leader, b"/st")
        read_until(screen, "Show the speed")  # the menu
        os.write(leader, b"\t\r")
        read_until(screen, "answers       0")
        read_until(screen, "> ")
        os.write(leader, b"Who is\\\rthere?\r")
        read_until(screen, "\x1b[2m4 tokens, ")
        read_until(screen, "> ")
        process.send_signal(signal.SIGINT)
        read_until(screen, "Ctrl-D leaves, as does /exit")
        read_until(screen, "> ")
        os.write(leader, b"\x04")
        assert process.wait() == 0
        seen = ""
        with contextlib.suppress(OSError):  # what Linux says when the other side has closed
            while more := os.read(leader, 1000):
                seen += more.decode()
    assert "Traceback" not in seen
    lines = [line for line in (tmp_path / "history").read_text().splitlines() if line.startswith("+")]
    assert lines == ["+/stats", "+Who is", "+there?"]
