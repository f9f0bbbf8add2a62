"""PNG charts of results. matplotlib is an extra (`benchmarks`), imported only to draw.

`Figure` is used without pyplot: no window system, no state shared with who imports this.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import BenchmarkError

DPI = 120
_COLOURS = ("#9aa5b1", "#4c8bbf", "#1f3f66", "#d98032")

Bar = tuple[float, float, float]
"""(low, value, high), with a whisker where low and high differ. A value that is its own low is
a range: both ends are written beside it."""


def figure_class() -> Any:
    """matplotlib's Figure. Raises BenchmarkError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BenchmarkError(
            "charts need matplotlib: pip install matplotlib (or jaxinfer[benchmarks]); "
            "or leave the chart out with --no-chart"
        ) from None
    return Figure


def check(path: Path | None) -> None:
    """Raises BenchmarkError, before anything is measured, where no chart can be drawn, or kept at
    `path` (None: a place that is written to anyway)."""
    figure_class()
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise BenchmarkError(f"--chart {path} cannot be written ({error}); name another") from None


def ratio_bars(
    path: Path,
    labels: Sequence[str],
    series: dict[str, Sequence[Bar | None]],
    *,
    title: str,
    axis: str,
    note: str = "",
) -> None:
    """Horizontal bars of ratios that grow from 1 on a logarithmic axis; None leaves a bar out.

    `series`: name -> one Bar per label. Raises BenchmarkError where `path` cannot be written.
    """
    height = 1.6 + len(labels) * (0.2 + 0.22 * len(series))
    figure = figure_class()(figsize=(9.0, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    step = 0.8 / len(series)
    top = 1.0
    for number, (name, bars) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        for row, bar in enumerate(bars):
            if bar is None:
                continue
            low, value, high = bar
            if not (0 < low <= value <= high and math.isfinite(high)):
                raise ValueError(f"{name} of {labels[row]}: {bar} is not 0 < low <= value <= high")
            at = row - 0.4 + (number + 0.5) * step
            axes.barh(at, value - 1, 0.9 * step, left=1, color=colour, label=name)
            if low < high:
                axes.plot([low, high], [at, at], color="black", linewidth=1)
            text = f"{low:.3g}-{high:.3g}x" if value == low < high else f"{value:.3g}x"
            axes.annotate(
                text, (max(high, 1), at), (3, 0), textcoords="offset points", va="center"
            ).set_fontsize(7)
            top = max(top, high)
    axes.set_xscale("log")
    axes.set_xlim(right=top * 1.6)
    first, last = axes.get_xlim()
    ticks = [m * 10.0**p for p in range(-3, 6) for m in (1, 2, 5)]
    ticks = [tick for tick in ticks if first <= tick <= last]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    axes.set_title(title)
    shown = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(shown.values(), shown.keys(), loc="lower right", fontsize=8)
    if note:
        figure.supxlabel(note, fontsize=7)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write the figure as a PNG. Raises BenchmarkError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise BenchmarkError(
            f"{path} cannot be written ({error}); name another with --chart"
        ) from None
