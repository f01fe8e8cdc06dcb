"""Plots of results, drawn by matplotlib, which only who asks for a plot needs."""

from pathlib import Path
from typing import Any, Literal

Kind = Literal["lines", "bars"]


def require_matplotlib(path: Path) -> None:
    """Raises ValueError if a plot cannot be written there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError('--plot needs matplotlib: pip install "dispec[bench]"') from None
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot is {path}, must end in .png, .svg or .pdf")


def draw(path: Path, points: dict[str, list[tuple[Any, float]]], title: str, x: str, y: str, kind: Kind) -> None:
    """Lines of (x, y) over a logarithmic x axis, or bars with a name each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if kind == "bars":
        for series, values in points.items():
            names, heights = zip(*values, strict=True)
            axes.bar_label(axes.barh(names, heights, label=series), fmt="%.4g", padding=3)
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
