"""Help, suggestions and shell completion of the command line."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from dispec.bench.cli import COMMANDS
from dispec.engine.option_fields import option_fields
from dispec.engine.options import EngineOptions
from dispec.serving.cli.commands import app
from dispec.serving.cli.help_layout import GROUPS
from dispec.serving.settings import ServerSettings
from tests.commands import dispec, one_sentence

ROOT_COMMAND: Any = typer.main.get_command(app)
HELPS = [[], *([name] for name in ROOT_COMMAND.commands), *(["bench", name] for name in COMMANDS)]


def params_of(path: list[str]) -> Iterator[Any]:
    """The parameters of a command, as click has parsed them."""
    command, context = ROOT_COMMAND, ROOT_COMMAND.make_context("dispec", [], resilient_parsing=True)
    for name in path:
        context = command.get_command(context, name).make_context(name, [], context, resilient_parsing=True)
        command = context.command
    yield from command.get_params(context)


@pytest.mark.parametrize("path", HELPS, ids=" ".join)
def test_help_shows_every_flag_whole(path: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {flag for param in params_of(path) if not param.hidden for flag in (*param.opts, *param.secondary_opts)}
    for width in (60, 80, 120, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        result = dispec(*path, "--help")
        assert result.code == 0
        lines = result.out.splitlines()
        assert max(map(len, lines)) <= min(width, 120), max(lines, key=len)
        assert "…" not in result.out
        starts = {word.strip(",") for line in lines if line.startswith("  -") for word in line.split()}
        assert {flag for flag in flags if flag.startswith("-")} <= starts


def test_environment_variables_are_explained_once() -> None:
    for command in ("generate", "serve", "quantize"):
        help_text = dispec(command, "--help").out
        assert len(re.findall("DISPEC_", help_text)) == 1
    assert "--config" in help_text or "max_num_seqs = 8" in dispec("serve", "--help").out


def test_defaults_and_required_options_are_shown() -> None:
    text = " ".join(dispec("serve", "--help").out.split())
    assert "--gpu-memory-utilization X Share of a CUDA device's memory to use. Default: 0.9." in text
    assert "--prefix-caching Compute a prefix once" in text
    assert "Size of a request's body. Default: 32 MiB." in text
    text = " ".join(dispec("quantize", "--help").out.split())
    assert "--out PATH Directory of the quantised model, new or empty. Required." in text
    assert "--bits N 4 or 8. Default: 4." in text


def test_options_are_grouped_by_task() -> None:
    text = dispec("serve", "--help").out
    headings = re.findall(r"^([A-Z].*):$", text, re.MULTILINE)
    assert headings == [title for title in (*GROUPS, "General") if title in headings]
    section = text.partition("\nMemory:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (--[\w-]+)", section, re.MULTILINE) == [
        *("--kv-cache-dtype", "--kv-cache-memory", "--gpu-memory-utilization"),
        *("--prefix-caching", "--no-prefix-caching", "--block-size"),
    ]
    for cls, without in ((EngineOptions, {"seed", "show_progress"}), (ServerSettings, set())):
        for name, field in option_fields(cls).items():
            assert name in without or field.option.group in GROUPS, name


def test_without_a_command_there_is_help() -> None:
    for args in ([], ["bench"]):
        assert dispec(*args) == dispec(*args, "--help")
    assert dispec("help", "serve") == dispec("serve", "--help")
    headings = re.findall(r"^([A-Z].*):$", dispec().out, re.MULTILINE)
    assert headings == ["Talk with a model", "Serve", "Models", "Measure", "General"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["serv"], "No such command 'serv'. Did you mean 'serve'? (see `dispec --help`)"),
        (["bench", "thruput"], "Did you mean 'throughput'? (see `dispec bench --help`)"),
        (["generate", "--modle", "x"], "--modle. Did you mean --model? (see `dispec generate --help`)"),
        (["serve", "--max-sequences", "8"], "--max-sequences. Did you mean --max-num-seqs?"),
        (["bench", "latency", "--concurency", "2"], "Did you mean --concurrency? (see `dispec bench latency --help`)"),
        (["quantize", "smollm2"], "Missing option '--out' (see `dispec quantize --help`)"),
    ],
)
def test_misspelt_names_are_answered_with_the_nearest(args: list[str], said: str) -> None:
    result = dispec(*args)
    assert result.code == 2
    assert said in one_sentence(result)


# Completion


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a `dispec` program, a model directory and a GGUF file."""
    directory = tmp_path_factory.mktemp("shell")
    program = directory / "dispec"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dispec "$@"\n')
    program.chmod(0o755)
    (directory / "small-model").mkdir()
    (directory / "small-model" / "config.json").write_text("{}")
    (directory / "small.gguf").write_bytes(b"")
    (directory / "other").mkdir()
    (directory / "hub" / "models--someone--tiny" / "snapshots").mkdir(parents=True)
    return directory


def completed(shell: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words, with the script of --show-completion."""
    script = f"""
source <(_DISPEC_COMPLETE=source_bash dispec)
COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
COMP_CWORD={len(words) - 1}
_dispec_completion dispec
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    environment = os.environ | {"PATH": f"{shell}:{os.environ['PATH']}", "HF_HUB_CACHE": str(shell / "hub")}
    done = subprocess.run(
        ["bash", "-c", script], cwd=shell, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["dispec", "se"], ["serve"]),
        (["dispec", "bench", "thr"], ["throughput"]),
        (["dispec", "serve", "--num-dec"], ["--num-decode-workers"]),
        (["dispec", "generate", "--dtype", "f"], ["float16", "float32"]),
        (["dispec", "generate", "--model", "s"], ["smollm2", "someone/tiny", "small-model", "small.gguf"]),
        (["dispec", "serve", "someone/t"], ["someone/tiny"]),
        (["dispec", "serve", "--speculative-model", "n"], ["ngram"]),
        (["dispec", "quantize", "./sm"], ["./small-model", "./small.gguf"]),
    ],
    ids=lambda value: " ".join(value[1:]) if value[0] == "dispec" else "",
)
def test_bash_completes(shell: Path, words: list[str], offered: list[str]) -> None:
    assert sorted(completed(shell, *words)) == sorted(offered)


def test_completion_of_names_loads_no_torch() -> None:
    code = """
import sys
from dispec.__main__ import main
try:
    main()
finally:
    assert not {"torch", "transformers", "gguf"} & set(sys.modules)
"""
    environment = os.environ | {
        "_DISPEC_COMPLETE": "complete_bash",
        "COMP_WORDS": "dispec serve --model s",
        "COMP_CWORD": "3",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "smollm2" in done.stdout.split()
