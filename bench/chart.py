"""Plots of results. matplotlib is imported only when a plot is requested."""

from pathlib import Path
from typing import Any, Literal

Kind = Literal["lines", "bars"]


def require_matplotlib(path: Path, option: str = "--plot") -> None:
    """Raise ValueError if a plot cannot be written to `path`, which `option` named."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(f'{option} needs matplotlib: pip install "dispec[bench]"') from None
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{option} is {path}, must end in .png, .svg or .pdf")


def draw(path: Path, points: dict[str, list[tuple[Any, float]]], title: str, x: str, y: str, kind: Kind) -> None:
    """Draw lines of (x, y) over a logarithmic x axis, or named bars, grouped by name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if kind == "bars":
        rows = bar_rows(points)
        figure.set_figheight(max(4.5, 0.2 * sum(map(len, rows.values())) + 0.15 * len(rows) + 1))
        for series, values in points.items():
            places = [rows[name][series] for name, _ in values]
            bars = axes.barh(places, [value for _, value in values], height=1.0, label=series)
            axes.bar_label(bars, fmt="%.4g", padding=3, fontsize=8)
        axes.set_yticks([sum(places.values()) / len(places) for places in rows.values()], list(rows))
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(y)
    else:
        for series, values in points.items():
            axes.plot(*zip(*values, strict=True), marker="o", label=series)
        axes.set_xscale("log", base=2)
        ticks = sorted({place for values in points.values() for place, _ in values})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    if len(points) > 1:
        axes.legend()
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)


def bar_rows(points: dict[str, list[tuple[Any, float]]]) -> dict[Any, dict[str, float]]:
    """Return the position of each bar by name and series: bars of a name side by side, a gap before the next name."""
    names = dict.fromkeys(name for values in points.values() for name, _ in values)
    rows, place = {}, 0.0
    for wanted in names:
        having = [series for series, values in points.items() if any(name == wanted for name, _ in values)]
        rows[wanted] = {series: place + index for index, series in enumerate(having)}
        place += len(having) + 0.7
    return rows
