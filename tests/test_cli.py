"""The command line: answers on standard output, everything else as lines on standard error."""

import dataclasses
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer

from dispec import LLM, EngineOptions, SamplingParams
from dispec.engine.errors import InvalidField
from dispec.engine.option_fields import option_fields
from dispec.serving.cli.commands import app, read_prompt
from dispec.serving.cli.console import explain, reporting
from dispec.serving.client.errors import EngineDied
from dispec.serving.settings import ServerSettings
from tests.checkpoints import save_tiny, save_tiny_gguf, tiny_model
from tests.commands import dispec, eager, one_sentence, running


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, "qwen3")
    return str(directory)


# Answers


def test_generate_writes_an_answer_and_its_rate() -> None:
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


@pytest.mark.smoke
def test_prompt_from_standard_input_and_quiet(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = dispec("generate", "The quick brown fox", *eager(tiny, "--raw", "--max-tokens", "8", "--ignore-eos", "-q"))
    assert given.code == 0
    assert given.out.strip()
    assert "loading" not in given.err
    assert "first token" not in given.err
    for prompt in (["-"], []):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The quick brown fox\n")))
        read = dispec("generate", *prompt, *eager(tiny, "--raw", "--max-tokens", "8", "--ignore-eos", "-q"))
        assert read.out == given.out


def test_one_newline_is_no_part_of_a_piped_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    for piped, prompt in ((b" a b \n", " a b "), (b"a\n\n", "a\n"), (b"a", "a")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        assert read_prompt("-") == prompt


def test_system_message_and_template_reach_the_model(tiny: str) -> None:
    common = ["generate", "hello", *eager(tiny, "--max-tokens", "12", "--ignore-eos", "-q")]
    answers = {dispec(*common, *more).out for more in ([], ["--raw"], ["--system", "Be brief."])}
    assert len(answers) == 3


def test_a_limit_that_cuts_an_answer_off_is_reported(tiny: str) -> None:
    result = dispec("generate", "hello", *eager(tiny, "--max-tokens", "1", "--ignore-eos"))
    assert result.err.splitlines()[-1].startswith("1 token, first token after ")
    assert result.err.splitlines()[-1].endswith("cut off by max_tokens or max_model_len")


def test_the_seed_repeats_a_sampled_answer(tiny: str) -> None:
    common = ["generate", "hello", *eager(tiny, "--max-tokens", "12", "--ignore-eos", "-q", "--temperature", "2")]
    first, again, other = (dispec(*common, "--seed", seed).out for seed in ("1", "1", "2"))
    assert first == again != other


def test_an_answer_follows_a_json_schema(tiny: str, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"]}
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema | {"additionalProperties": False}))
    result = dispec("generate", "Hi", *eager(tiny, "--raw", "--json-schema", str(path), "--max-tokens", "40"))
    assert result.code == 0
    assert json.loads(result.out) in ({"a": "b"}, {"a": "c"})


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ("{", "schema.json is not JSON: "),
        ("[" * 10_000, "schema.json is nested more than 100 levels deep"),
        ('{"items": {"uniqueItems": true}}', "schema.json: /items/uniqueItems is a keyword that cannot be enforced"),
        (None, "schema.json cannot be read: No such file"),
    ],
)
def test_a_wrong_schema_is_refused_before_the_model_is_loaded(tmp_path: Path, contents: str | None, said: str) -> None:
    path = tmp_path / "schema.json"
    if contents is not None:
        path.write_text(contents)
    result = dispec("generate", "Hi", "--model", "/no/such/model", "--json-schema", str(path))
    assert result.code == 2
    assert said in one_sentence(result)


@pytest.mark.smoke
def test_version() -> None:
    result = dispec("--version")
    assert result.code == 0
    assert result.out.startswith("dispec ")


@pytest.mark.parametrize("command", ["generate", "chat", "env-check"])
def test_help(command: str) -> None:
    assert command in dispec("--help").out
    result = dispec(command, "--help")
    assert result.code == 0
    assert f"dispec {command}" in result.out


# Options


def options_of(command: str) -> dict[str, Any]:
    commands = getattr(typer.main.get_command(app), "commands")  # noqa: B009 (typer's own class of groups)
    return {option.name: option for option in commands[command].params}


@pytest.mark.smoke
def test_each_declared_option_is_a_flag_and_a_variable() -> None:
    serve, generate = options_of("serve"), options_of("generate")
    for name in set(option_fields(EngineOptions)) - {"seed", "show_progress"} | set(option_fields(ServerSettings)):
        for option in [serve[name]] + ([generate[name]] if name in option_fields(EngineOptions) else []):
            assert f"DISPEC_{name.upper()}" in option.envvar
            flag = "prefix-caching" if name == "enable_prefix_caching" else name.replace("_", "-")
            assert f"--{flag}" in option.opts
            assert bool(option.is_flag) == bool(option.secondary_opts)


def test_each_option_is_a_documented_argument() -> None:
    names = [field.name for field in dataclasses.fields(EngineOptions)]
    assert list(option_fields(EngineOptions)) == names
    assert list(inspect.signature(LLM).parameters) == names
    assert [field.name for field in dataclasses.fields(ServerSettings)] == list(option_fields(ServerSettings))
    of_python = ["output_kind"]
    assert [field.name for field in dataclasses.fields(SamplingParams)] == [*option_fields(SamplingParams), *of_python]
    for name in names:
        assert f"\n{name}: {option_fields(EngineOptions)[name].option.help}" in str(LLM.__init__.__doc__)


@pytest.mark.smoke
@pytest.mark.parametrize("cls", [EngineOptions, SamplingParams, ServerSettings])
def test_values_beyond_their_limits_are_refused(cls: type) -> None:
    for name, field in option_fields(cls).items():
        option = field.option
        for limit, inside in ((option.ge, True), (option.le, True), (option.gt, False)):
            if limit is None:
                continue
            if inside and name not in ("max_num_batched_tokens", "max_tokens", "min_tokens"):  # which have other rules
                cls(**{name: limit})
            beyond = limit + 1 if limit is option.le else limit - 1 if inside else limit
            with pytest.raises(InvalidField, match=rf"^{name} is {re.escape(str(beyond))}, must be (above|between) "):
                cls(**{name: beyond})


@pytest.mark.smoke
def test_options_by_environment_variable(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL": tiny, "ENFORCE_EAGER": "1", "MAX_MODEL_LEN": "16", "QUIET": "1"}.items():
        monkeypatch.setenv(f"DISPEC_{name}", value)
    result = dispec("generate", "hello " * 50)
    assert result.code == 2
    assert "max_model_len (16)" in one_sentence(result)
    assert result.err.count("\n") == 1


# Errors


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([""], "the prompt is empty"),
        (["hi", "--max-tokens", "-1"], "max_tokens is -1, must be between 1 and"),
        (["hi", "--temperature", "-1"], "temperature is -1.0, must be between 0 and 100"),
        (["hi", "--raw", "--system", "x"], "--system is part of a chat template"),
        (["hi", "--model", "/no/such/model"], "there is no model at /no/such/model"),
        (["hi", "--dtype", "int3"], "dtype is 'int3', must be one of auto, bfloat16"),
        (["hi", "--device", "cuda:99"], "device is 'cuda:99', but torch sees"),
        (["hi", "--block-size", "17"], "block_size is 17"),
        (["hi", "--kv-cache-memory", "much"], "kv_cache_memory is 'much'"),
        (["hi", "--max-tokens", "few"], "Invalid value for '--max-tokens': "),
        (["hi", "--no-such-option"], "--no-such-option"),
        (["\udcff"], "not UTF-8"),
    ],
    ids=lambda value: " ".join(value).encode(errors="replace").decode() if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(args: list[str], said: str) -> None:
    result = dispec("generate", *args)
    assert result.code == 2
    assert said in one_sentence(result)
    assert result.out == ""


def test_a_prompt_is_asked_for_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(b""))
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "the prompt is empty" in one_sentence(dispec("generate"))
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    assert "there is no prompt: give one, as in" in one_sentence(dispec("generate"))


def test_a_wrong_value_of_a_variable_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPEC_PORT", "x")
    assert "env var" not in one_sentence(dispec("serve"))


def test_a_prompt_that_does_not_fit(tiny: str) -> None:
    result = dispec("generate", "hello " * 50, *eager(tiny, "--max-model-len", "32"))
    assert result.code == 2
    assert "must be below max_model_len (32)" in one_sentence(result)


@pytest.mark.parametrize("size", ["1KiB", "9999999TiB"])
def test_absurd_cache_sizes(tiny: str, size: str) -> None:
    result = dispec("generate", "hi", "--model", tiny, "--enforce-eager", "--kv-cache-memory", size)
    assert "kv_cache_memory" in one_sentence(result)
    assert result.code == 2


def test_a_truncated_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    save_tiny_gguf(path, tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))
    path.write_bytes(path.read_bytes()[:-100_000])
    result = dispec("generate", "hi", *eager(str(path)))
    assert result.code == 2
    assert "broken.gguf" in one_sentence(result)


def test_a_config_that_contradicts_its_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    result = dispec("generate", "hi", *eager(str(tmp_path)))
    assert result.code == 2
    assert "tensor" in one_sentence(result)


@pytest.mark.parametrize("by", ["option", "environment"])
def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
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
        (EngineDied("dtype is 'x'", "a hint", "ValueError", is_bad_input=True), "dtype is 'x'", 2),
        (EngineDied("no room", "lower it", "OSError"), "the engine could not go on: OSError: no room (hint: lower", 1),
    ],
)
def test_errors_become_a_sentence_and_an_exit_code(error: Exception, said: str, code: int) -> None:
    sentence, exit_code = explain(error)
    assert sentence.startswith(said)
    assert exit_code == code


def test_a_warning_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with reporting(quiet=True, debug=False):
        warnings.warn("this\nand that", RuntimeWarning, stacklevel=1)
    assert capfd.readouterr().err == "warning: this and that\n"
    with pytest.raises(typer.Exit) as exit_, reporting(quiet=True, debug=False):
        raise KeyboardInterrupt
    assert exit_.value.exit_code == 130


# Signals and pipes


def test_interrupting_an_answer(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3", max_position_embeddings=100_000)  # for an answer that outlasts the test
    args = ["generate", "hello", "--model", str(tmp_path), "--enforce-eager", "--ignore-eos", "--max-tokens", "90000"]
    with running(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "interrupted"
    assert "Traceback" not in err.decode()


def test_a_closed_pipe_ends_the_command(tiny: str) -> None:
    args = ["generate", "hello", *eager(tiny, "--ignore-eos", "--max-tokens", "400", "--quiet")]
    with running(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait() == 141
    assert err == ""
