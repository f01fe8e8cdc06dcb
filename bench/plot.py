"""Draw the results of `dispec bench compare` or `throughput` as a picture, for pages of light or dark background.

dispec bench plot compare.jsonl --output bench/compare.svg
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from dispec.bench.chart import require_matplotlib
from dispec.bench.compare import Case
from dispec.bench.workload import Workload

# Colours and a grey for text that have enough contrast on white and on near-black.
_COLORS = ("#2f81f7", "#8b949e", "#d29922", "#3fb950")
_TEXT = "#7d8590"
_TITLES = {
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen2.5-7B",
    "smollm2": "SmolLM2-135M",
}


class Row(NamedTuple):
    """Tokens per second of each contestant in one case, under a heading that several cases share.

    order: of headings, those of whole requests first.
    """

    order: int
    heading: str
    label: str
    tokens_per_second: dict[str, float]


def read_rows(lines: Iterable[str]) -> tuple[list[Row], str]:
    """Return the rows of both benchmarks' JSON lines, and the machine. The last line of a case counts.

    Raises ValueError if no line has figures of two contestants or more.
    """
    rows: dict[str, Row] = {}
    machine = ""
    for record in map(json.loads, lines):
        if record["bench"] not in ("compare", "throughput"):
            continue
        rates = {name: rate for name, rate in record["figures"]["tokens_per_second"].items() if rate}
        if len(rates) > 1:
            machine = _describe(record["machine"])
            # `throughput` has one model and one kind of case in all its rows: they are settings.
            row = _row(record.get("settings", {}) | record["case"], rates)
            rows[f"{row.heading} {row.label}"] = row
    if not rows:
        raise ValueError("no line holds tokens per second of two contestants or more, as `dispec bench compare` writes")
    return sorted(rows.values(), key=lambda row: row.order), machine


def _describe(machine: dict[str, Any]) -> str:
    device = str(machine["device"])
    return device if device.startswith("NVIDIA") else f"{device}, {machine['cores']} cores"


def _row(case: dict[str, Any], rates: dict[str, float]) -> Row:
    sizes = {name: case[name] for name in ("concurrency", "prompt_tokens", "output_tokens")}
    one = Case(Workload(**sizes), case["decode_only"])
    model, count, prompt = _TITLES.get(case["model"], case["model"]), case["concurrency"], case["prompt_tokens"]
    if one.is_prefill:
        return Row(1, f"{model}, prefill", f"{prompt:,} tokens", rates)
    if one.decode_only:
        return Row(2, f"{model}, decoding at a context", f"{count} x {prompt:,} tokens", rates)
    heading = f"{model}, {prompt} tokens in, {case['output_tokens']} out"
    return Row(0, heading, f"{count} request{'s' if count > 1 else ''}", rates)


def draw_rows(path: Path, rows: list[Row], machine: str) -> None:
    """Draw bars for each row, in two columns: each contestant's rate over the last one's, labelled with its rate."""
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in rows for name in row.tokens_per_second))
    columns = _in_columns(rows)
    num_lines = max(len(column) * (len(names) + 0.6) + 1.8 * _num_headings(column) for column in columns)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dispec"}):
        figure = Figure(figsize=(10, 0.9 + 0.19 * num_lines), layout="constrained")
        axes = figure.subplots(1, len(columns), sharex=True, squeeze=False)[0]
        for column, one in zip(columns, axes, strict=True):
            _draw_column(one, column, names)
            one.set_ylim(num_lines, 0)
        axes[0].margins(x=0.12)
        title = f"Tokens per second, bf16, {machine} (bars relative to {_title(names[-1])})"
        figure.suptitle(title, fontsize=11, color=_TEXT)
        handles = axes[0].get_legend_handles_labels()
        place = {"loc": "outside lower center", "ncols": len(names)}
        figure.legend(*handles, **place, frameon=False, fontsize=10, labelcolor=_TEXT)
        metadata = {"Date": None} if path.suffix == ".svg" else None  # the same picture twice is the same file
        figure.savefig(path, dpi=150, transparent=True, metadata=metadata)


def _draw_column(axes: Any, rows: list[Row], names: list[str]) -> None:
    """Draw rows below each other, one unit of the y axis for each bar."""
    first, place = [], 0.0
    for before, row in zip([None, *rows], rows, strict=False):
        if before is None or before.heading != row.heading:
            axes.text(0, place + 1.0, row.heading, fontsize=10, fontweight="bold", va="center", color=_TEXT)
            place += 1.8
        first.append(place + 0.5)
        place += len(names) + 0.6
    for index, name in enumerate(names):
        rates = [row.tokens_per_second.get(name, 0.0) for row in rows]
        bars = axes.barh(
            [at + index for at in first],
            [rate / _base(row, names) for row, rate in zip(rows, rates, strict=True)],
            height=0.94,
            label=_title(name),
            color=_COLORS[index % len(_COLORS)],
        )
        labels = [f"{rate:,.0f}" if rate else "" for rate in rates]
        axes.bar_label(bars, labels, padding=4, fontsize=9, color=_TEXT)
    axes.set_yticks([at + (len(names) - 1) / 2 for at in first], [row.label for row in rows], fontsize=9)
    axes.tick_params(length=0, colors=_TEXT)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def _in_columns(rows: list[Row]) -> list[list[Row]]:
    """Return the rows in two columns of about the same height that part no rows of one heading."""
    starts = [index for index in range(1, len(rows)) if rows[index].heading != rows[index - 1].heading]
    if not starts:
        return [rows]
    middle = min(starts, key=lambda index: abs(2 * index - len(rows)))
    return [rows[:middle], rows[middle:]]


def _num_headings(rows: list[Row]) -> int:
    return len({row.heading for row in rows})


def _base(row: Row, names: list[str]) -> float:
    return next(row.tokens_per_second[name] for name in reversed(names) if name in row.tokens_per_second)


def _title(name: str) -> str:
    return {"dispec": "DiSpec", "vllm": "vLLM"}.get(name, name)


def main(
    results: Annotated[
        list[Path], typer.Argument(help="JSON lines that `compare` or `throughput` wrote with --output.")
    ],
    output: Annotated[Path, typer.Option(help="The picture, .svg, .png or .pdf.")],
) -> None:
    """Draw tokens per second of contestants side by side."""
    require_matplotlib(output, "--output")
    rows, machine = read_rows(line for path in results for line in path.read_text().splitlines() if line)
    draw_rows(output, rows, machine)


if __name__ == "__main__":
    typer.run(main)
