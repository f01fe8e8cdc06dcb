"""Documents name files, modules and options that exist."""

import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from dispec.__main__ import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
FOLDERS = ("engine", "layers", "ops", "serving", "bench", "tests")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_files_exist(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
    relative = [link for link in links if "://" not in link]
    assert [link for link in relative if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(document: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", document.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_modules_exist(document: Path) -> None:
    named = re.findall(r"python -m dispec\.([\w.]+)", document.read_text(encoding="utf-8"))
    assert [
        name for name in named if not (ROOT / f"{name.replace('.', '/')}.py").is_file() and "NAME" not in name
    ] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_the_options_that_documents_give(document: Path) -> None:
    group: Any = get_command(app)
    text = document.read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in _lines(block)]
    commands += re.findall(r"`(dispec [^`]+)`", text)
    unknown = []
    for command in commands:
        words = command.split(" #")[0].split()
        while words and "=" in words[0]:  # variables
            words.pop(0)
        if words[:1] != ["dispec"] or len(words) < 2:
            continue
        _, name, *given = words
        if name == "bench":  # its benchmarks read their own options
            continue
        if name not in group.commands and not name.startswith("-"):
            unknown.append(command)
            continue
        if name.startswith("-"):
            given.append(name)
        params = group.commands.get(name, group).params
        options = {option for one in params for option in (*one.opts, *one.secondary_opts)}
        named = {word.split("=")[0] for word in given if word.startswith("-")}
        unknown += [f"{name} {option}" for option in named - options - {"--help"}]
    assert unknown == []


def _lines(block: str) -> list[str]:
    return [part for line in block.replace("\\\n", " ").splitlines() for part in re.split(r"&&|;|\|", line)]
