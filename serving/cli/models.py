"""`dispec models`, `pull` and `rm`: the models on this machine's disk."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Annotated, Any

import typer

from dispec.engine.loading.default_model import DEFAULT_DRAFT, DEFAULT_MODEL
from dispec.serving.cli.completion import complete_model
from dispec.serving.cli.console import parameter_count, reporting, say, shows_progress
from dispec.serving.cli.option_groups import Debug, Quiet

_HEADINGS = ("NAME", "PARAMETERS", "SIZE", "LAST USED", "MODEL")
_GAP = "  "
_MIN_LAST_COLUMN = 30  # a narrower terminal gets longer lines
_RUNNING = "Servers that run it keep it in memory, but need the files again when their engine restarts."

Model = Annotated[
    str,
    typer.Argument(
        help="smollm2, smollm2-draft or a hub id (owner/name).",
        autocompletion=complete_model((DEFAULT_MODEL, DEFAULT_DRAFT)),
    ),
]


def models(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the path of each model too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """List the models on this machine's disk: parameters, size, format of the weights, and whether they can run."""
    with reporting(quiet=True, debug=debug):
        from dispec.engine.loading.model_cache import cached_models

        found = list(cached_models())
        if as_json:
            print(json.dumps([_record(model) for model in found], indent=2))
        elif not found:
            say("no model is on this machine's disk: `dispec pull smollm2` downloads the default one (93 MB)")
        else:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            notes = [str(model.path) if verbose else "" for model in found]
            print(*_table(map(_cells, found), notes, width), sep="\n")


def pull(model: Model, quiet: Quiet = False, debug: Debug = False) -> None:
    """Download a model, after a check that it can run."""
    shows_progress(quiet)
    with reporting(quiet=quiet, debug=debug):
        from dispec.engine.loading.model_cache import pull

        pulled = pull(model)
        if not quiet:
            say(f"{model}: {_size(pulled.size)} in {pulled.path}")


def rm(
    model: Model,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    debug: Debug = False,
) -> None:
    """Remove a model from the disk. On a terminal it asks first."""
    with reporting(quiet=False, debug=debug):
        from dispec.engine.loading.model_cache import find_cached, remove

        found = find_cached(model)
        question = f"remove {model} ({_size(found.size)})? {_RUNNING}"
        if not yes and sys.stdin.isatty() and not typer.confirm(question, err=True):
            raise typer.Exit(1)
        say(f"{model} is removed: {_size(remove(found))} freed")


def _record(model: Any) -> dict[str, Any]:
    facts = model.facts
    return {
        "name": model.name,
        "architecture": facts.architecture or None,
        "problem": facts.problem or None,
        "parameters": facts.num_parameters or None,
        "weights": _weights(model) or None,
        "size_bytes": model.size,
        "last_used": datetime.fromtimestamp(model.last_used).astimezone().isoformat(timespec="seconds"),
        "path": str(model.path),
    }


def _cells(model: Any) -> tuple[str, ...]:
    facts = model.facts
    used = datetime.fromtimestamp(model.last_used).date().isoformat()
    count = parameter_count(facts.num_parameters) if facts.num_parameters else ""
    return model.name, count, _size(model.size), used, facts.problem or f"{facts.architecture}, {_weights(model)}"


def _weights(model: Any) -> str:
    is_dequantised = model.name == DEFAULT_MODEL and model.facts.weights
    return f"{model.facts.weights}{', dequantised to bfloat16 on load' if is_dequantised else ''}"


def _table(rows: Iterable[tuple[str, ...]], notes: list[str], width: int | None) -> Iterator[str]:
    """Yield the lines of a table, each row followed by its note. The last column is wrapped to a width of all."""
    lines = [_HEADINGS, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    indent = " " * sum(one + len(_GAP) for one in widths)
    for cells, note in zip(lines, ["", *notes], strict=True):
        left = _GAP.join(f"{cell:<{one}}" for cell, one in zip(cells, widths, strict=False))
        room = None if width is None else max(width - len(indent), _MIN_LAST_COLUMN)
        first, *more = [cells[-1]] if room is None else textwrap.wrap(cells[-1], room) or [""]
        yield f"{left}{_GAP}{first}"
        yield from (f"{indent}{line}" for line in more)
        if note:
            yield f"{_GAP}{note}"


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
