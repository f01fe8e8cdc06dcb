"""A benchmark's output: a table, and on request JSON lines and a plot.

A line of JSON is one row of the table:

    bench       the command
    time        when the row was made, UTC
    commit      of DiSpec
    machine     device, cores, memory; with measured rates where the command measures them
    versions    of Python, torch, transformers, triton, DiSpec, and of the peers that ran
    settings    the command's options
    case        what distinguishes the row, such as {"concurrency": 16}
    figures     measurements in seconds, bytes and per second
"""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dispec.bench.chart import Kind, draw, require_matplotlib
from dispec.bench.machine import Machine, commit, versions
from dispec.engine.loading.model_cache import weights_on_disk

Output = Annotated[Path | None, typer.Option(help="Append results to this file, as JSON lines.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the results into this file, .png, .svg or .pdf.")]

_SECRET = ("api_key",)


@dataclass
class Report:
    """Rows of a benchmark. Raises ValueError before anything is measured if the output or plot cannot be written.

    columns: of the table, each with its number format, such as {"tokens/s": ".1f"} or {"ratio": ".2fx"}; "" aligns text
        left, " " right.
    """

    bench: str
    settings: dict[str, Any]
    machine: Machine
    columns: dict[str, str]
    output: Path | None = None
    plot: Path | None = None
    rates: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    _cells: list[list[str]] = field(default_factory=list)
    _points: dict[str, list[tuple[Any, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.plot is not None:
            require_matplotlib(self.plot)
        for path in (self.output, self.plot):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"{path}: there is no folder {path.absolute().parent}")
        self._commit = commit()
        chosen = {name: value for name, value in self.settings.items() if name not in _SECRET}
        self.settings = {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()}
        known = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        model = self.settings.get("model")
        stored = None if model is None else weights_on_disk(str(model))
        weights = "" if stored is None else f"; weights of {model} on disk: {stored}"
        print(f"{self.machine.describe()}; commit {self._commit}; {known}{weights}", flush=True)

    def add(self, case: dict[str, Any], figures: dict[str, Any], cells: list[Any]) -> None:
        """Add a row: `cells` for the table; `case` and `figures` for the file, written at once."""
        formats = self.columns.values()
        self._cells.append([_cell(value, form) for value, form in zip(cells, formats, strict=True)])
        if self.output is not None:
            with self.output.open("a") as file:
                file.write(json.dumps(self.record(case, figures), allow_nan=False) + "\n")

    def record(self, case: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": self._commit,
            "machine": self.machine.as_record() | self.rates,
            "versions": self.versions,
            "settings": self.settings,
            "case": case,
            "figures": figures,
        }

    def point(self, series: str, x: Any, y: float) -> None:
        """Add a point to the plot, or a bar if `x` is a name."""
        self._points.setdefault(series, []).append((x, y))

    def finish(self, x: str = "", y: str = "", kind: Kind = "lines") -> None:
        """Print the table and draw the plot; `x` and `y` name its axes."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, form in self.columns.items():
            table.add_column(name, justify="right" if form else "left", no_wrap=True)
        for row in self._cells:
            table.add_row(*row)
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=1000)
        console.print(table)
        if self.plot is not None:
            draw(self.plot, self._points, f"{self.bench}: {self.machine.device}", x, y, kind)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if not form.strip():
        return str(value)
    return format(value, form.removesuffix("x")) + "x" * form.endswith("x")
