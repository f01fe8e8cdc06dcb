"""The command line, as its users meet it: answers on standard output, everything else as lines on standard error."""

import dataclasses
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from engine.options import EngineOptions
from serving import cli, env_check
from serving.chat import Turn, fit
from serving.cli_options import engine_options
from serving.console import explain, reporting
from serving.env_check import Finding
from tests.checkpoints import save_tiny, save_tiny_gguf, tiny_model

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "serving.cli"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def dispec(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process."""

    def run(*args: str) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main(list(args))
        out, err = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return Result(exit_.value.code, out, err)

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, "qwen3")
    return str(directory)


def eager(model: str, *args: str) -> list[str]:
    return ["--model", model, "--enforce-eager", "--kv-cache-memory", "4MiB", *args]


def one_sentence(result: Result) -> str:
    """What an error said, after checking that it is all that was said about it."""
    assert "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert result.err.splitlines()[-1] == errors[0]
    return errors[0]


def spawn(args: list[str], **options: Any) -> subprocess.Popen[bytes]:
    # A shell may have started us with SIGINT ignored, which a child would inherit; a handler it does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    # Threads that wait for one another collapse where other processes share their cores, as on a busy build machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        return subprocess.Popen([*COMMAND, *args], cwd=ROOT, env=environment, start_new_session=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def running(args: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = spawn(args, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def read_until(file: Any, text: str) -> str:
    """Read, as it comes, to the end of `text`."""
    seen = b""
    while not seen.endswith(text.encode()):
        byte = os.read(file.fileno(), 1)
        assert byte, f"{text!r} never came: {seen.decode()}"
        seen += byte
    return seen.decode()


# Answers


def test_generate_answers_and_tells_how_fast() -> None:
    question = "What is the capital of France?"
    with running(["generate", question, "--enforce-eager"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = (stream.decode() for stream in process.communicate())
    assert process.returncode == 0, err
    assert "Paris" in out
    assert out.endswith("\n")
    lines = err.splitlines()
    assert lines[0] == "loading smollm2"
    assert any(line.startswith("  kv cache ") for line in lines)
    count, rate, first = lines[-1].split(", ")
    assert count.endswith(" tokens")
    assert rate.endswith(" tokens/s")
    assert float(rate.split()[0]) > 0
    assert first.startswith("first token after ")


def test_prompt_from_standard_input_and_quiet(
    dispec: Callable[..., Result], tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dispec("generate", "The quick brown fox", *eager(tiny, "--raw", "--max-tokens", "8", "--ignore-eos", "-q"))
    assert given.code == 0
    assert given.out.strip()
    assert "loading" not in given.err
    assert "first token" not in given.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The quick brown fox\n")))
    read = dispec("generate", "-", *eager(tiny, "--raw", "--max-tokens", "8", "--ignore-eos", "-q"))
    assert read.out == given.out


def test_system_message_and_template_reach_the_model(dispec: Callable[..., Result], tiny: str) -> None:
    common = ["generate", "hello", *eager(tiny, "--max-tokens", "12", "--ignore-eos", "-q")]
    answers = {dispec(*common, *more).out for more in ([], ["--raw"], ["--system", "Be brief."])}
    assert len(answers) == 3


def test_length_and_count_are_told(dispec: Callable[..., Result], tiny: str) -> None:
    result = dispec("generate", "hello", *eager(tiny, "--max-tokens", "1", "--ignore-eos"))
    assert result.err.splitlines()[-1].startswith("1 token, first token after ")
    assert result.err.splitlines()[-1].endswith("cut off by max_tokens or max_model_len")


def test_the_seed_repeats_a_sampled_answer(dispec: Callable[..., Result], tiny: str) -> None:
    common = ["generate", "hello", *eager(tiny, "--max-tokens", "12", "--ignore-eos", "-q", "--temperature", "2")]
    first, again, other = (dispec(*common, "--seed", seed).out for seed in ("1", "1", "2"))
    assert first == again != other


def test_version(dispec: Callable[..., Result]) -> None:
    result = dispec("--version")
    assert result.code == 0
    assert result.out.startswith("dispec ")


@pytest.mark.parametrize("command", ["generate", "chat", "env-check"])
def test_help(dispec: Callable[..., Result], command: str) -> None:
    assert command in dispec("--help").out
    result = dispec(command, "--help")
    assert result.code == 0
    assert f"dispec {command}" in result.out


# Options


def test_engine_options_are_those_of_the_engine() -> None:
    fields = {field.name for field in dataclasses.fields(EngineOptions)}
    assert set(inspect.signature(engine_options).parameters) <= fields
    assert engine_options(block_size=32) == {"model": "smollm2", "block_size": 32, "enforce_eager": False}


def test_options_by_environment_variable(
    dispec: Callable[..., Result], tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MODEL": tiny, "ENFORCE_EAGER": "1", "MAX_MODEL_LEN": "16", "QUIET": "1"}.items():
        monkeypatch.setenv(f"DISPEC_{name}", value)
    result = dispec("generate", "hello " * 50)
    assert result.code == 2
    assert "max_model_len (16)" in one_sentence(result)
    assert result.err.count("\n") == 1


# Errors


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([""], "the prompt is empty"),
        (["hi", "--max-tokens", "-1"], "max_tokens is -1, must be between 1 and"),
        (["hi", "--temperature", "-1"], "temperature is -1.0, must be between 0 and 100"),
        (["hi", "--raw", "--system", "x"], "--system is part of a chat template"),
        (["hi", "--model", "/no/such/model"], "there is no model at /no/such/model"),
        (["hi", "--dtype", "int3"], "dtype is 'int3', must be one of bfloat16"),
        (["hi", "--device", "cuda:99"], "device is 'cuda:99', but torch sees"),
        (["hi", "--block-size", "17"], "block_size is 17"),
        (["hi", "--kv-cache-memory", "much"], "kv_cache_memory is 'much'"),
        (["hi", "--max-tokens", "few"], "'--max-tokens'"),
        (["hi", "--no-such-option"], "--no-such-option"),
        (["\udcff"], "not UTF-8"),
        ([], "Missing argument"),
    ],
    ids=lambda value: " ".join(value).encode(errors="replace").decode() if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(dispec: Callable[..., Result], args: list[str], said: str) -> None:
    result = dispec("generate", *args)
    assert result.code == 2
    assert said in one_sentence(result)
    assert result.out == ""


def test_a_prompt_that_does_not_fit(dispec: Callable[..., Result], tiny: str) -> None:
    result = dispec("generate", "hello " * 50, *eager(tiny, "--max-model-len", "32"))
    assert result.code == 2
    assert "must be below max_model_len (32)" in one_sentence(result)


@pytest.mark.parametrize(("size", "code"), [("1KiB", 2), ("9999999TiB", 1)])
def test_absurd_cache_sizes(dispec: Callable[..., Result], tiny: str, size: str, code: int) -> None:
    result = dispec("generate", "hi", "--model", tiny, "--enforce-eager", "--kv-cache-memory", size)
    assert "kv_cache_memory" in one_sentence(result)
    assert result.code == code


def test_a_truncated_gguf_file(dispec: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    save_tiny_gguf(path, tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))
    path.write_bytes(path.read_bytes()[:-100_000])
    result = dispec("generate", "hi", *eager(str(path)))
    assert result.code == 2
    assert "broken.gguf" in one_sentence(result)


def test_a_config_that_contradicts_its_weights(dispec: Callable[..., Result], tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    result = dispec("generate", "hi", *eager(str(tmp_path)))
    assert result.code == 2
    assert "tensor" in one_sentence(result)


@pytest.mark.parametrize("by", ["option", "environment"])
def test_debug_shows_where_an_error_came_from(
    dispec: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setenv("DISPEC_DEBUG", "1" if by == "environment" else "0")
    result = dispec("generate", "hi", "--max-tokens", "-1", *(["--debug"] if by == "option" else []))
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("error: max_tokens is -1")


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (ValueError("two\nlines"), "two lines", 2),
        (FileNotFoundError(2, "No such file or directory", "x.json"), "x.json: No such file or directory", 1),
        (MemoryError(), "not enough memory: lower kv_cache_memory", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory (DefaultCPU", 1),
        (ImportError("no libcuda"), "a package is missing or broken (no libcuda)", 1),
        (KeyError("x"), "unexpected KeyError: 'x'", 1),
    ],
)
def test_explanations(error: Exception, said: str, code: int) -> None:
    sentence, exit_code = explain(error)
    assert sentence.startswith(said)
    assert exit_code == code


def test_warnings_are_tidy_lines(capfd: pytest.CaptureFixture[str]) -> None:
    with reporting(quiet=True, debug=False):
        warnings.warn("this\nand that", RuntimeWarning, stacklevel=1)
    assert capfd.readouterr().err == "warning: this and that\n"
    with pytest.raises(typer.Exit) as exit_, reporting(quiet=True, debug=False):
        raise KeyboardInterrupt
    assert exit_.value.exit_code == 130


# Signals and pipes


def test_interrupting_an_answer(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3", max_position_embeddings=100_000)  # more to say than anybody waits for
    args = ["generate", "hello", "--model", str(tmp_path), "--enforce-eager", "--ignore-eos", "--max-tokens", "90000"]
    with running(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "interrupted"
    assert "Traceback" not in err.decode()


def test_a_reader_that_leaves(tiny: str) -> None:
    args = ["generate", "hello", *eager(tiny, "--ignore-eos", "--max-tokens", "400", "--quiet")]
    with running(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait() == 141
    assert err == ""


# Conversations


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


def test_a_conversation_outgrows_the_context(
    dispec: Callable[..., Result], tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_model_without_a_chat_template(dispec: Callable[..., Result], tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "no chat template" in one_sentence(dispec("chat", *eager(str(tmp_path))))
    assert dispec("generate", "hello", *eager(str(tmp_path), "--max-tokens", "2")).code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("key", [b"\x03", b"\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_leaving_at_the_prompt(tiny: str, key: bytes) -> None:
    import pty

    leader, follower = pty.openpty()
    terminal = {"stdin": follower, "stdout": follower, "stderr": follower}
    with os.fdopen(leader, "rb", buffering=0) as screen, running(["chat", *eager(tiny, "-q")], **terminal) as process:
        os.close(follower)
        seen = read_until(screen, "> ")
        if key == b"\x03":  # the terminal is not the session's own, so that the key alone sends no signal
            process.send_signal(signal.SIGINT)
        else:
            os.write(leader, key)
        assert process.wait() == 0
        try:
            while more := os.read(leader, 1000):
                seen += more.decode()
        except OSError:  # what Linux says when the other side has closed
            pass
    assert "Traceback" not in seen


# env-check


def test_env_check_for_machines(tmp_path: Path) -> None:
    with running(["env-check", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    report = json.loads(out)
    assert report["findings"]["python"]["executable"] == sys.executable
    assert report["findings"]["memory"]["free_bytes"] > 0
    assert report["findings"]["cpu engine"]["works"]
    assert report["features"]["eager CPU"] == {"works": True, "reason": ""}
    assert report["features"]["compiled CPU"]["works"] == report["findings"]["cpu compiler"]["works"]


def test_env_check_without_a_compiler() -> None:
    environment = {"CXX": "/bin/false", "DISPEC_CACHE_DIR": "/dev/null/nowhere"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with running(["env-check"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out, err = (stream.decode() for stream in process.communicate())
    assert process.returncode == 0, err
    assert err == ""
    rows = {line[:17].strip(): line[18:] for line in out.splitlines()}
    assert rows["cpu engine"].startswith("works")
    assert rows["cpu compiler"].startswith("does not work: ")
    assert rows["cache"].startswith("not writable: ")
    assert "compiled CPU              no: cpu compiler: " in out


def test_env_check_where_torch_is_broken() -> None:
    found = [Finding("torch", "cannot be imported: x", {"works": False, "reason": "x"})]
    features = env_check.features(found)
    assert not env_check.can_run(features)
    assert all(not feature.works for feature in features)


def test_env_check_tells_which_device_fails() -> None:
    works, broken = {"works": True, "reason": ""}, {"works": False, "reason": "too old"}
    names = ["cpu engine", "cpu compiler", "cpu bf16", "cpu packed bf16"]
    parts = ("bf16", "engine", "compiler", "graphs")
    found = dict.fromkeys(names, works) | {"torch": {"works": True, "cuda": "13.0"}}
    for device in ("cuda:0", "cuda:1"):
        found |= {device: {}} | {f"{device} {part}": works for part in parts}
    found["cuda:1 engine"] = broken
    features = {
        feature.name: feature for feature in env_check.features(Finding(*item, item[1]) for item in found.items())
    }
    assert features["eager CPU"].works
    assert features["CUDA graphs"] == ("CUDA graphs", False, "cuda:1 engine: too old")
