"""`dispec chat`: its memory of a conversation, and the ways to end it."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dispec import SamplingParams
from dispec.engine.text.text_stream import TextStream
from dispec.serving.cli.chat import Turn, converse, fit
from tests.checkpoints import save_tiny
from tests.commands import dispec, eager, one_sentence, read_until, running
from tests.scripted_engine import thinking_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, "qwen3")
    return str(directory)


def test_a_conversation_remembers_stops_and_forgets() -> None:
    with running(
        ["chat", "--enforce-eager", "--max-tokens", "48"],
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


class Thinker:
    """A model that reasons before each answer, as far as `converse` needs one."""

    engine = SimpleNamespace(max_model_len=4096)

    def __init__(self) -> None:
        self.tokenizer = thinking_tokenizer(are_special=True)
        self.prompts: list[str] = []

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[SimpleNamespace]:
        self.prompts.append(self.tokenizer.decode(prompt, skip_special_tokens=False))
        text = TextStream(self.tokenizer, params, prompt)
        tokens = self.tokenizer.encode("<think>\nHm.\n</think>\n\nIt is Paris.")
        for index, token in enumerate(tokens):
            is_last = index == len(tokens) - 1
            yield SimpleNamespace(text=text.add(token, ends=False), completion="whole" if is_last else None)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_reasoning_is_dimmed_and_forgotten(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Thinker()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where?\nWhere again?\n"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    assert list(converse(model, SamplingParams(max_tokens=100))) == ["whole"] * 2  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    dimmed = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", shown))
    assert dimmed == ("Hm." * 2 if is_terminal else "")
    assert re.sub(r"\x1b\[2m.*?\x1b\[0m", "", shown).replace("\n\n", "") == "It is Paris.\n" * 2
    assert "It is Paris." in model.prompts[1]
    assert "Hm." not in model.prompts[1]


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "no chat template" in one_sentence(dispec("chat", *eager(str(tmp_path))))
    assert dispec("generate", "hello", *eager(str(tmp_path), "--max-tokens", "2")).code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("key", [b"\x03", b"\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_a_key_at_the_prompt_ends_the_conversation(tiny: str, key: bytes) -> None:
    import pty

    leader, follower = pty.openpty()
    terminal = {"stdin": follower, "stdout": follower, "stderr": follower}
    with os.fdopen(leader, "rb", buffering=0) as screen, running(["chat", *eager(tiny, "-q")], **terminal) as process:
        os.close(follower)
        seen = read_until(screen, "> ")
        if key == b"\x03":  # the terminal is not the session's own, so that the key alone sends no signal
            # Again if need be: one that comes between the prompt and the wait for a line is only noticed after that.
            while process.poll() is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
        else:
            os.write(leader, key)
        assert process.wait() == 0
        try:
            while more := os.read(leader, 1000):
                seen += more.decode()
        except OSError:  # what Linux says when the other side has closed
            pass
    assert "Traceback" not in seen
